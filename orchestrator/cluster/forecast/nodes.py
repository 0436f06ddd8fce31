"""The nodes of a cluster as the scheduler sees them: what lies on each, and which of them a pod may use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from orchestrator.cluster.forecast.amounts import ZERO, Amounts, amounts, short, told
from orchestrator.cluster.forecast.answer import Object
from orchestrator.cluster.forecast.demand import Group, requests_of

STAYS = ("DaemonSet", "Node")
"""Owners of pods that lie on a node whatever else does."""
HOLDS_OFF = ("NoSchedule", "NoExecute")
PASSING = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable", "node.kubernetes.io/unschedulable",
           "node.kubernetes.io/memory-pressure", "node.kubernetes.io/disk-pressure",
           "node.kubernetes.io/pid-pressure")  # fmt: skip
"""Taints of a node that is ill for now: a run waits for it, no toleration is the way out."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node; `room` is what is left beside pods that always stay, `free` beside all that lie there now."""

    name: str
    labels: Mapping[str, str]
    taints: tuple[Object, ...]
    room: Amounts
    free: Amounts
    tenants: tuple[Object, ...]
    """Pods that will go at some time."""

    @property
    def ill(self) -> str | None:
        """Why nothing begins there for now."""
        keys = [taint["key"] for taint in self.taints if taint["key"] in PASSING]
        return keys[0].rpartition("/")[2] if keys else None


def read_nodes(nodes: Iterable[Object], pods: Iterable[Object]) -> list[Node]:
    """Nodes with what lies on them; pods that have ended hold nothing."""
    lying: dict[str, list[Object]] = defaultdict(list)
    for pod in pods:
        where = pod["spec"].get("nodeName")
        if where and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed"):
            lying[where].append(pod)
    return [_node(one, lying[one["metadata"]["name"]]) for one in nodes]


def _node(node: Object, pods: Sequence[Object]) -> Node:
    meta, spec = node["metadata"], node.get("spec") or {}
    room = amounts((node.get("status") or {}).get("allocatable"))
    staying = [pod for pod in pods if _stays(pod)]
    tenants = tuple(pod for pod in pods if not _stays(pod))
    room = _less(room, map(_taken, staying))
    free = _less(room, map(_taken, tenants))
    return Node(meta["name"], meta.get("labels") or {}, tuple(_taints(node, spec)), room, free, tenants)


def _taints(node: Object, spec: Object) -> Iterable[Object]:
    """Those that hold pods off; the scheduler sees a node that is not ready before its taint is there."""
    known = [taint for taint in spec.get("taints") or [] if taint["effect"] in HOLDS_OFF]
    yield from known
    keys = {taint["key"] for taint in known}
    ready = [c["status"] for c in (node.get("status") or {}).get("conditions") or [] if c["type"] == "Ready"]
    if ready and ready[0] != "True" and not keys & set(PASSING[:2]):
        yield {"key": PASSING[0], "effect": "NoSchedule"}
    if spec.get("unschedulable") and PASSING[2] not in keys:
        yield {"key": PASSING[2], "effect": "NoSchedule"}


def _stays(pod: Object) -> bool:
    return any(owner["kind"] in STAYS for owner in pod["metadata"].get("ownerReferences") or [])


def _taken(pod: Object) -> Amounts:
    return requests_of(pod["spec"])


def _less(room: Amounts, taken: Iterable[Amounts]) -> dict[str, Decimal]:
    left = dict(room)
    for part in taken:
        for name, value in part.items():
            left[name] = left.get(name, ZERO) - value
    return left


def barred(group: Group, node: Node) -> str | None:
    """Why pods of a group may not lie on a node at all, whatever is free there; None where they may."""
    for taint in node.taints:
        if not any(_tolerates(one, taint) for one in group.spec.get("tolerations") or []):
            return f"have the taint {taint_text(taint)}"
    for key, value in (group.spec.get("nodeSelector") or {}).items():
        if node.labels.get(key) != value:
            return f"lack the label {key}={value}"
    if not _matches_affinity(group.spec, node):
        return "are ruled out by the affinity"
    return None


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if not toleration.get("key"):
        return toleration.get("operator") == "Exists"
    if toleration["key"] != taint["key"]:
        return False
    return toleration.get("operator") == "Exists" or (toleration.get("value") or "") == (taint.get("value") or "")


def taint_text(taint: Object) -> str:
    """As `cluster.tolerations` takes it."""
    value = f"={taint['value']}" if taint.get("value") else ""
    return f"{taint['key']}{value}:{taint['effect']}"


def _matches_affinity(spec: Object, node: Node) -> bool:
    wanted = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    )
    terms = (wanted or {}).get("nodeSelectorTerms")
    return terms is None or any(all(_matches(rule, node) for rule in _rules(term)) for term in terms)


def _rules(term: Object) -> list[Object]:
    return [*(term.get("matchExpressions") or []), *(term.get("matchFields") or [])]


def _matches(rule: Object, node: Node) -> bool:
    value = node.name if rule["key"] == "metadata.name" else node.labels.get(rule["key"])
    values, known = rule.get("values") or [], value is not None
    answers = {
        "In": known and value in values,
        "NotIn": not known or value not in values,
        "Exists": known,
        "DoesNotExist": not known,
        "Gt": known and _number(value) > _number(values[0] if values else None),
        "Lt": known and _number(value) < _number(values[0] if values else None),
    }
    return answers[rule["operator"]]


def _number(text: str | None) -> int:
    return int(text) if text and text.lstrip("-").isdigit() else 0


def count_of(requests: Amounts, room: Amounts) -> int:
    """How many such pods a room holds."""
    wanted = {name: value for name, value in requests.items() if value > 0}
    return max(0, min(int(room.get(name, ZERO) // value) for name, value in wanted.items()))


def shortest(requests: Amounts, room: Amounts) -> str | None:
    """The resource that one such pod lacks most there, as a share of what it asks for."""
    lacking = {
        name: (value - room.get(name, ZERO)) / value for name, value in requests.items() if value > room.get(name, ZERO)
    }
    return max(lacking, key=lambda name: lacking[name]) if lacking else None


def has(name: str, room: Amounts) -> str:
    """`have 4 GPU`."""
    value = max(room.get(name, ZERO), ZERO)
    return f"have {told(name, value)} {short(name)}" if value else f"have no {short(name)}"
