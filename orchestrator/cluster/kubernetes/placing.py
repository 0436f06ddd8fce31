"""Which nodes a pod may lie on, and for how long it stays on one that does not answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.cluster.job import JobSpec
from orchestrator.options import Spread

NODE_NAME = "metadata.name"
"""The field of a node that a pod's spec.nodeName repeats; the label of the host's name may differ from it."""
LOST = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
"""Taints of a node that does not answer."""
SKEW = 1
"""Pods that one part of the topology may have more than another."""


def tolerations(spec: JobSpec) -> list[dict[str, Any]]:
    """Lost nodes, GPUs, then what the config names."""
    lost = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": round(spec.lost_node_s)}
        for key in LOST
    ]
    gpu = {"key": spec.resources.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}
    named = [_toleration(entry) for entry in spec.tolerations]
    return [*lost, *([gpu] if spec.resources.gpus and gpu not in named else []), *named]


def _toleration(entry: str) -> dict[str, Any]:
    """Of `key:Effect` or `key=value:Effect`."""
    taint, _, effect = entry.rpartition(":")
    key, equals, value = taint.partition("=")
    if not equals:
        return {"key": key, "operator": "Exists", "effect": effect}
    return {"key": key, "operator": "Equal", "value": value, "effect": effect}


def affinity(spec: JobSpec, labels: dict[str, str]) -> dict[str, Any]:
    """`labels` are those of the run's pods that train."""
    wanted: dict[str, Any] = {}
    if spec.avoid_nodes:
        wanted["nodeAffinity"] = away_from(spec.avoid_nodes)
    if spec.spread is Spread.pack:
        beside = {"labelSelector": {"matchLabels": labels}, "topologyKey": spec.topology}
        wanted["podAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [beside]}
    return wanted


def away_from(names: Sequence[str]) -> dict[str, Any]:
    """An affinity to all nodes but these; a rule about a field takes one value."""
    rules = [{"key": NODE_NAME, "operator": "NotIn", "values": [name]} for name in names]
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": rules}]}}


def spread(spec: JobSpec, labels: dict[str, str]) -> list[dict[str, Any]]:
    """Over the parts that a pod may lie in at all: taints and selectors count."""
    if spec.spread is not Spread.spread:
        return []
    return [
        {
            "maxSkew": SKEW,
            "topologyKey": spec.topology,
            "whenUnsatisfiable": "DoNotSchedule",
            "nodeAffinityPolicy": "Honor",
            "nodeTaintsPolicy": "Honor",
            "labelSelector": {"matchLabels": labels},
        }
    ]
