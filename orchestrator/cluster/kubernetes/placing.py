"""Which nodes a pod may lie on, and for how long it stays on one that does not answer."""

from __future__ import annotations

from typing import Any

from orchestrator.cluster.job import JobSpec
from orchestrator.options import Spread

HOSTNAME = "kubernetes.io/hostname"
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
        rule = {"key": HOSTNAME, "operator": "NotIn", "values": list(spec.avoid_nodes)}
        terms = [{"matchExpressions": [rule]}]
        wanted["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    if spec.spread is Spread.pack:
        beside = {"labelSelector": {"matchLabels": labels}, "topologyKey": spec.topology}
        wanted["podAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [beside]}
    return wanted


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
