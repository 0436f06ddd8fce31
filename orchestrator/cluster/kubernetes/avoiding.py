"""Nodes that a launcher found unfit (44): which they are, and the objects of a run that keep away from them. Pure.

A pod's end says the code and its spec the node, so no process needs to know the name of its node. The affinity of the
objects themselves is the memory: what an earlier life of a run avoided is read from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from orchestrator.cluster.kubernetes.packing import packs
from orchestrator.cluster.kubernetes.placing import NODE_NAME, away_from
from orchestrator.cluster.kubernetes.pod import COMPONENT
from orchestrator.cluster.kubernetes.pods import unfit_nodes

Object = dict[str, Any]


def nodes_to_avoid(objects: Sequence[Object], pods: Iterable[Object]) -> list[str]:
    """Those that the run's objects avoid already, and those that its last pods found unfit.

    None for pods that pack shards: their 44 is a disk that is full, which is a claim's.
    """
    return [] if packs(objects[-1]) else sorted({*avoided(objects), *unfit_nodes(pods)})


def is_warned(run: Object, pods: Iterable[Object]) -> bool:
    """Whether a run's own object keeps away from every node that one of these pods found unfit."""
    return packs(run) or set(unfit_nodes(pods)) <= set(avoided([run]))


def avoided(objects: Sequence[Object]) -> list[str]:
    """Names of the nodes that the pods which train avoid."""
    rules = [rule for pod in _training(objects) for rule in _rules(pod["spec"].get("affinity") or {})]
    return sorted({name for rule in rules if rule["key"] == NODE_NAME for name in rule["values"]})


def avoid(objects: Sequence[Object], names: Sequence[str]) -> None:
    """Let the pods that train keep away from these nodes, and from no others."""
    for pod in _training(objects):
        pod["spec"]["affinity"] = {**(pod["spec"].get("affinity") or {}), "nodeAffinity": away_from(names)}


def _rules(affinity: Object) -> list[Object]:
    required = (affinity.get("nodeAffinity") or {}).get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    return [rule for term in required.get("nodeSelectorTerms") or [] for rule in term.get("matchFields") or []]


def _training(node: Any) -> Iterator[Object]:
    """The templates of pods that train, wherever a kind keeps them."""
    if isinstance(node, dict):
        labels = (node.get("metadata") or {}).get("labels") or {}
        if labels.get(COMPONENT) == "node" and "containers" in (node.get("spec") or {}):
            yield node
            return
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _training(item)
