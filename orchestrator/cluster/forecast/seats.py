"""How many pods of a run find a place, by room that is free now or by room that ever is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from orchestrator.cluster.forecast.amounts import ZERO, Amounts
from orchestrator.cluster.forecast.demand import Group
from orchestrator.cluster.forecast.nodes import Node, barred, count_of, has, shortest


@dataclass(slots=True)
class Seats:
    """What a group found."""

    wanted: int
    found: int
    because: Counter[str] = field(default_factory=Counter)
    """Why nodes take none of its pods, and how many nodes."""
    lacks: Counter[str] = field(default_factory=Counter)
    """The resource of which one pod more would want most, on nodes that the pods may use."""
    narrow: str | None = None
    """The rule of placing that left room unused."""

    @property
    def enough(self) -> bool:
        return self.found >= self.wanted


def seat(group: Group, nodes: Sequence[Node], rooms: Mapping[str, Amounts]) -> tuple[Seats, dict[str, int]]:
    """Places for one group within `rooms` by node, and how many pods each node takes."""
    seats, holds = Seats(group.count, 0), dict[str, int]()
    domains: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        reason = barred(group, node)
        if reason:
            seats.because[reason] += 1
            continue
        if not _in_a_domain(group, node):
            seats.because[f"lack the label {_topology(group)}"] += 1
            continue
        holds[node.name] = count_of(group.requests, rooms[node.name])
        domains[node.labels.get(_topology(group), node.name)].append(node)
        lacking = shortest(group.requests, rooms[node.name])
        if lacking:
            seats.because[has(lacking, rooms[node.name])] += 1
    by_domain = {name: sum(holds[node.name] for node in members) for name, members in domains.items()}
    given = _give(group, by_domain)
    seats.found = sum(given.values())
    if not seats.enough and sum(by_domain.values()) > seats.found:
        seats.narrow = _rule(group)
    taken = _spread_out(given, domains, holds)
    lacking = (shortest(group.requests, less(rooms[name], group, taken.get(name, 0))) for name in holds)
    seats.lacks.update(filter(None, lacking))
    return seats, taken


def less(room: Amounts, group: Group, count: int) -> dict[str, Decimal]:
    """What a room still holds beside so many pods."""
    return {name: value - count * group.requests.get(name, ZERO) for name, value in room.items()}


def seat_all(groups: Sequence[Group], nodes: Sequence[Node], rooms: Mapping[str, Amounts]) -> dict[str, Seats]:
    """Places for all groups, the greatest pods first, each in what the ones before left."""
    left, found = dict(rooms), dict[str, Seats]()
    for group in sorted(groups, key=lambda one: (-one.requests.get("memory", Decimal(0)), one.role)):
        found[group.role], taken = seat(group, nodes, left)
        for name, count in taken.items():
            left[name] = less(left[name], group, count)
    return found


def _give(group: Group, by_domain: Mapping[str, int]) -> dict[str, int]:
    """Pods by domain: packed into one, evenly up to the skew, or wherever there is room."""
    if not by_domain:
        return {}
    if _packs(group):
        best = max(by_domain, key=lambda name: by_domain[name])
        return {best: min(group.count, by_domain[best])}
    skew = _skew(group)
    most = None if skew is None else min(by_domain.values()) + skew
    given, left = dict.fromkeys(by_domain, 0), group.count
    caps = {name: room if most is None else min(room, most) for name, room in by_domain.items()}
    while left and any(given[name] < caps[name] for name in given):
        open_ones = [name for name in given if given[name] < caps[name]]
        level = min(given[name] for name in open_ones)
        for name in [one for one in open_ones if given[one] == level][:left]:
            given[name] += 1
            left -= 1
    return given


def _spread_out(
    given: Mapping[str, int], domains: Mapping[str, Sequence[Node]], holds: Mapping[str, int]
) -> dict[str, int]:
    taken: dict[str, int] = {}
    for name, count in given.items():
        for node in sorted(domains[name], key=lambda one: -holds[one.name]):
            taken[node.name] = min(count, holds[node.name])
            count -= taken[node.name]
    return {name: count for name, count in taken.items() if count}


def _constraint(group: Group) -> dict[str, object] | None:
    hard = [
        one for one in group.spec.get("topologySpreadConstraints") or [] if one["whenUnsatisfiable"] != "ScheduleAnyway"
    ]
    return hard[0] if hard else None


def _beside(group: Group) -> dict[str, object] | None:
    affinity = ((group.spec.get("affinity") or {}).get("podAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    )
    return affinity[0] if affinity else None


def _packs(group: Group) -> bool:
    return _beside(group) is not None


def _skew(group: Group) -> int | None:
    constraint = _constraint(group)
    return int(str(constraint["maxSkew"])) if constraint else None


def _topology(group: Group) -> str:
    rule = _beside(group) or _constraint(group)
    return str(rule["topologyKey"]) if rule else ""


def _in_a_domain(group: Group, node: Node) -> bool:
    """A node without the label of the topology takes no pod that is spread or packed by it."""
    return not _topology(group) or _topology(group) in node.labels


def _rule(group: Group) -> str:
    where = _topology(group)
    if _packs(group):
        return f"all pods must lie within one {where} (cluster.spread=pack)"
    return f"no {where} may have more than {_skew(group)} pod above another (cluster.spread=spread)"
