"""The layer of nodes: does the scheduler find a place for every pod, now or ever, and what stands in the way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from orchestrator.cluster.forecast.amounts import ZERO, Amounts, short, told, total
from orchestrator.cluster.forecast.answer import Finding, Object, Surroundings, Verdict, named, unchecked
from orchestrator.cluster.forecast.demand import Group, Share, requests_of
from orchestrator.cluster.forecast.nodes import Node, barred, count_of, read_nodes, taint_text
from orchestrator.cluster.forecast.seats import Seats, seat_all
from orchestrator.cluster.kubernetes.resources import RUN

LAYER = "nodes"
MOST_HOLDERS = 3
MOST_REASONS = 4
MOST_SHARES = 8
"""Pods that a change may put on one node."""


@dataclass(frozen=True, slots=True)
class Change:
    """One way to ask for something else."""

    said: str
    groups: tuple[Group, ...]


def judge_nodes(groups: Sequence[Group], around: Surroundings, share: Share) -> Finding:
    """FITS, WAITS behind what, or NEVER with the smallest change that would make it fit."""
    missing = unchecked(LAYER, around, "Node", "Pod")
    if missing:
        return missing
    nodes = read_nodes(around.of("Node"), around.of("Pod"))
    well = [node for node in nodes if not node.ill]
    now = seat_all(groups, well, {node.name: node.free for node in well})
    if _all_seated(now):
        return Finding(LAYER, Verdict.fits, f"{_wish(groups)}: there is room now{_on(groups, well)}")
    ever = seat_all(groups, _without_illness(nodes), {node.name: node.room for node in nodes})
    if not _all_seated(ever):
        return _never(groups, nodes, ever, share)
    return _waits(groups, around, nodes, now)


def _never(groups: Sequence[Group], nodes: Sequence[Node], ever: Mapping[str, Seats], share: Share) -> Finding:
    short_of = next(seats for seats in ever.values() if not seats.enough)
    most = f"could never hold more than {short_of.found} of {short_of.wanted}" if short_of.found else "holds none, ever"
    said = f"{_wish(groups)}; the cluster {most}"
    if short_of.narrow:
        said += f": {short_of.narrow}"
    if short_of.because:
        said += f"; of {len(nodes)} nodes {_reasons(short_of.because)}"
    change = next((one for one in changes(groups, nodes, ever, share) if _fits_ever(one.groups, nodes)), None)
    way_out = change.said if change else "another cluster, or ask for smaller pods"
    return Finding(LAYER, Verdict.never, said, way_out)


def _waits(groups: Sequence[Group], around: Surroundings, nodes: Sequence[Node], now: Mapping[str, Seats]) -> Finding:
    short_of = next(seats for seats in now.values() if not seats.enough)
    lower = _without_lower(groups, around, nodes)
    if lower is not None:
        return lower
    said = f"{_wish(groups)}; there is room for {short_of.found} of {short_of.wanted} now"
    if short_of.narrow:
        said += f": {short_of.narrow}"
    ill = Counter(node.ill for node in nodes if node.ill)
    if ill:
        said += "; " + ", ".join(f"{count} nodes are {what}" for what, count in ill.items())
    usable = [node for node in nodes if not any(barred(group, node) for group in groups)]
    lacking = short_of.lacks.most_common(1)
    behind = _holders(usable, lacking[0][0]) if lacking else ""
    return Finding(LAYER, Verdict.waits, said + behind)


def _without_lower(groups: Sequence[Group], around: Surroundings, nodes: Sequence[Node]) -> Finding | None:
    """FITS where the scheduler would end pods of a lower priority for it."""
    own = max(_priority(group.spec, around) for group in groups)
    rooms, ended = {}, Counter[str]()
    for node in nodes:
        stay = [pod for pod in node.tenants if _priority(pod["spec"], around) >= own]
        ended.update(_owner(pod) for pod in node.tenants if _priority(pod["spec"], around) < own)
        taken = total(requests_of(pod["spec"]) for pod in stay)
        rooms[node.name] = {key: value - taken.get(key, 0) for key, value in node.room.items()}
    well = [node for node in nodes if not node.ill]
    if not ended or not _all_seated(seat_all(groups, well, rooms)):
        return None
    names = ", ".join(name for name, _ in ended.most_common(MOST_HOLDERS))
    said = f"{_wish(groups)}: there is room once pods of a lower priority are ended for it ({names})"
    return Finding(LAYER, Verdict.fits, said)


def _priority(spec: Object, around: Surroundings) -> int:
    if spec.get("priority") is not None:
        return int(spec["priority"])
    classes = [] if around.unread("PriorityClass") else around.of("PriorityClass")
    name = spec.get("priorityClassName")
    found = named(classes, name) if name else next((one for one in classes if one.get("globalDefault")), None)
    return int(found["value"]) if found else 0


def _holders(nodes: Sequence[Node], resource: str) -> str:
    """Who holds what is short, the greatest first, since when."""
    sums: dict[str, Decimal] = defaultdict(Decimal)
    since: dict[str, str] = {}
    for node in nodes:
        for pod in node.tenants:
            held = requests_of(pod["spec"]).get(resource)
            if held:
                owner = _owner(pod)
                sums[owner] += held
                began = str(
                    (pod.get("status") or {}).get("startTime") or pod["metadata"].get("creationTimestamp") or ""
                )
                since[owner] = min(filter(None, (since.get(owner), began)), default="")
    greatest = sorted(sums, key=lambda owner: -sums[owner])[:MOST_HOLDERS]
    each = [f"{owner} ({told(resource, sums[owner])} {short(resource)} since {since[owner]})" for owner in greatest]
    return f"; behind {', '.join(each)}" if each else ""


def _owner(pod: Object) -> str:
    """The run, else whoever made the pod, else the pod."""
    meta = pod["metadata"]
    run = (meta.get("labels") or {}).get(RUN)
    owners = meta.get("ownerReferences") or [{"name": meta["name"]}]
    return f"run {run}" if run else f"{meta.get('namespace', '')}/{owners[0]['name']}"


def changes(
    groups: Sequence[Group], nodes: Sequence[Node], ever: Mapping[str, Seats], share: Share
) -> Iterator[Change]:
    """What could be asked for instead, the smallest change first; `ever`: what the groups find as they are."""
    yield from _tolerating(groups, nodes)
    yield from _unselected(groups)
    yield from _unplaced(groups)
    yield from _smaller(groups, nodes, "cpu", share)
    yield from _smaller(groups, nodes, "memory", share)
    yield from _thinner(groups)
    yield from _fewer(groups, ever)


def _tolerating(groups: Sequence[Group], nodes: Sequence[Node]) -> Iterator[Change]:
    taints = {taint_text(taint): taint for node in _without_illness(nodes) for taint in node.taints}
    for text, taint in sorted(taints.items()):
        more = {"key": taint["key"], "operator": "Exists", "effect": taint["effect"]}
        yield Change(
            f"cluster.tolerations=[{text}]",
            tuple(_with(one, tolerations=[*(one.spec.get("tolerations") or []), more]) for one in groups),
        )


def _unselected(groups: Sequence[Group]) -> Iterator[Change]:
    for key in sorted({key for one in groups for key in one.spec.get("nodeSelector") or {}}):
        left = [{k: v for k, v in (one.spec.get("nodeSelector") or {}).items() if k != key} for one in groups]
        pairs = zip(groups, left, strict=True)
        yield Change(f"cluster.node_selector without {key}", tuple(_with(one, nodeSelector=new) for one, new in pairs))


def _unplaced(groups: Sequence[Group]) -> Iterator[Change]:
    yield Change(
        "cluster.spread=any",
        tuple(_with(_with(one, topologySpreadConstraints=None), affinity=_alone(one.spec)) for one in groups),
    )


def _alone(spec: Object) -> Object:
    return {key: value for key, value in (spec.get("affinity") or {}).items() if key == "nodeAffinity"}


def _smaller(groups: Sequence[Group], nodes: Sequence[Node], resource: str, share: Share) -> Iterator[Change]:
    """The greatest group with as much of one resource as its nodes can give."""
    group = max(groups, key=lambda one: one.count * one.requests.get("memory", Decimal(1)))
    rooms = {node.room.get(resource, ZERO) for node in _without_illness(nodes) if not barred(group, node)}
    parts = {room / shares for room in rooms for shares in range(1, MOST_SHARES + 1)}
    for room in sorted((one for one in parts if 0 < one < group.requests.get(resource, ZERO)), reverse=True):
        less = replace(group, requests={**group.requests, resource: room})
        said = f"{share.key(resource, room)} (a pod then asks for {told(resource, room)} {resource})"
        yield Change(said, tuple(less if one is group else one for one in groups))


def _thinner(groups: Sequence[Group]) -> Iterator[Change]:
    """As many processes on more nodes."""
    group = max(groups, key=lambda one: one.count)
    for parts in (2, 4, 8, 16):
        if any(value % parts for name, value in group.requests.items() if name.endswith("/gpu")):
            return
        less = {name: value if name == "pods" else value / parts for name, value in group.requests.items()}
        thin = replace(group, count=group.count * parts, requests=less)
        yield Change(
            f"compute.num_nodes={thin.count} with as many processes in all",
            tuple(thin if one is group else one for one in groups),
        )


def _fewer(groups: Sequence[Group], ever: Mapping[str, Seats]) -> Iterator[Change]:
    """As many pods as there is room for."""
    group = max(groups, key=lambda one: one.count)
    count = ever[group.role].found
    if 0 < count < group.count:
        few = replace(group, count=count)
        yield Change(
            f"compute.num_nodes={count} with {count}/{group.count} of the processes",
            tuple(few if one is group else one for one in groups),
        )


def _with(group: Group, **fields: object) -> Group:
    return replace(group, spec={**group.spec, **fields})


def _fits_ever(groups: Sequence[Group], nodes: Sequence[Node]) -> bool:
    return _all_seated(seat_all(groups, _without_illness(nodes), {node.name: node.room for node in nodes}))


def _without_illness(nodes: Sequence[Node]) -> list[Node]:
    """The same nodes as they are when they are well."""
    return [
        replace(node, taints=tuple(one for one in node.taints if "node.kubernetes.io/" not in one["key"]))
        if node.ill
        else node
        for node in nodes
    ]


def _all_seated(found: Mapping[str, Seats]) -> bool:
    return all(seats.enough for seats in found.values())


def _on(groups: Sequence[Group], nodes: Sequence[Node]) -> str:
    """On how many nodes that are free enough."""
    able = sum(any(not barred(one, node) and count_of(one.requests, node.free) for one in groups) for node in nodes)
    return f" on {able} of {len(nodes)} nodes"


def _wish(groups: Sequence[Group]) -> str:
    """`needs 4 x (8 GPU, 16 cpu, 64 GiB memory)`."""
    return "needs " + " and ".join(f"{one.count} x ({asked(one.requests)})" for one in groups)


def asked(requests: Amounts) -> str:
    order = sorted(requests, key=lambda name: (not name.endswith("/gpu"), name))
    parts = [f"{told(name, requests[name])} {short(name)}" for name in order if name != "pods" and requests[name]]
    return ", ".join(parts)


def _reasons(because: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in because.most_common(MOST_REASONS))
