"""Where each second of a run went, on every rank and between the attempts: a pure function of its events.

A rank's event says what the seconds since the one before went to (`phases`). What no event tells is worked out: the
tail of a rank that was killed, the steps that a later attempt computed again, the time between two attempts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from orchestrator.track.runs import Event

PHASES = (
    "queue", "image_pull", "start", "import", "compile", "data_wait", "compute", "communication_wait",
    "checkpoint_stall", "evaluation", "lost_work", "recovery", "finish", "idle",
)  # fmt: skip
"""In this order they are shown. `finish` is what follows the last step: pictures, the end of the mirror, the report."""
REPEATED = ("compute", "compile", "data_wait", "communication_wait", "evaluation")
"""What counts as lost work where its steps are computed again."""
ORDERLY = (0, 45, 130, 143)
"""Exit codes of a launcher that ended after saving."""
ROUNDING_S = 0.002


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of time and the phases that it went to."""

    began: float
    ended: float
    seconds: dict[str, float]


@dataclass(slots=True)
class AttemptSpan:
    """One attempt: when, on how many ranks, from which step on."""

    number: int
    began: float
    ended: float
    world_size: int
    resumed_at: int
    ranks: dict[int, list[Event]]
    fault: Event | None = None
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    """Of each rank, from `began` to `ended` without a gap."""

    @property
    def devices(self) -> dict[int, str]:
        """Name of the device of each rank that lived to tell."""
        return {r: str(e["device"]) for r, events in self.ranks.items() for e in events if "device" in e}


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch in which no rank ran, and how many processes were held for it."""

    piece: Piece
    world_size: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """All attempts of a run and what lay between them."""

    attempts: list[AttemptSpan]
    gaps: list[Gap]

    @property
    def began(self) -> float:
        return min([a.began for a in self.attempts] + [g.piece.began for g in self.gaps], default=0.0)

    @property
    def ended(self) -> float:
        return max([a.ended for a in self.attempts] + [g.piece.ended for g in self.gaps], default=0.0)


def read_timeline(ranks: Mapping[int, Sequence[Event]], launcher: Sequence[Event], alive: bool = True) -> Timeline:
    """`ranks`: the events of each rank in the order of writing. `alive`: the last attempt may still be going on."""
    attempts = _attempts(ranks, launcher)
    for number, attempt in enumerate(attempts):
        floor = _floor(attempt, attempts[number + 1 :], launcher, alive)
        for rank in range(attempt.world_size):
            attempt.pieces[rank] = _pieces(attempt, attempt.ranks.get(rank, []), floor)
    return Timeline(attempts, _gaps(attempts, launcher))


def _attempts(ranks: Mapping[int, Sequence[Event]], launcher: Sequence[Event]) -> list[AttemptSpan]:
    grouped: dict[int, dict[int, list[Event]]] = {}
    for event in launcher:
        if event["kind"] in ("launch", "restart", "fault"):
            grouped.setdefault(event["attempt"], {})
    for rank, events in ranks.items():
        for event in events:
            if "t" in event:
                grouped.setdefault(event.get("attempt", 1), {}).setdefault(rank, []).append(event)
    spans = [_span(number, group, launcher) for number, group in sorted(grouped.items())]
    for earlier, later in pairwise(spans):
        earlier.ended = max(earlier.began, min(earlier.ended, later.began))  # an older attempt that did not know
    return spans


def _span(number: int, ranks: dict[int, list[Event]], launcher: Sequence[Event]) -> AttemptSpan:
    own = [e for e in launcher if e["attempt"] == number]
    told = [event for events in ranks.values() for event in events]
    starts = [e for e in told if e["kind"] == "start"]
    fault = next((e for e in own if e["kind"] == "fault"), None)
    launched = [e["t"] for e in own if e["kind"] in ("launch", "restart")]
    times = [e["t"] - sum(_phases(e).values()) for e in told]
    began = min([e["began"] for e in starts if "began" in e] or launched or times or [e["t"] for e in own])
    sizes = [e["world_size"] for e in (*starts, *own) if "world_size" in e]
    resumed = min((int(e["step"]) for e in told if "step" in e), default=-1)
    ended = max(float(t) for t in [began, *(e["t"] for e in told), *([fault["t"]] if fault else [])])
    return AttemptSpan(number, began, ended, max([*sizes, *(r + 1 for r in ranks)], default=1), resumed, ranks, fault)


def _floor(attempt: AttemptSpan, later: Sequence[AttemptSpan], launcher: Sequence[Event], alive: bool) -> float:
    """The step after which nothing of an attempt has stayed."""
    resumed = [other.resumed_at for other in later if other.resumed_at >= 0]
    if resumed:
        return min(resumed)
    ended = [e.get("exit_code") for e in launcher if e["kind"] == "end" and e["attempt"] >= attempt.number]
    if attempt.fault is None and alive and all(code in ORDERLY for code in ended):
        return math.inf
    if any(e["kind"] in ("end", "stop") for events in attempt.ranks.values() for e in events):
        return math.inf
    saved = [e["step"] for events in attempt.ranks.values() for e in events if e["kind"] == "saved"]
    return max([attempt.resumed_at, *saved])


def _pieces(attempt: AttemptSpan, events: Sequence[Event], floor: float) -> list[Piece]:
    """The time of one rank from the attempt's first to its last moment."""
    pieces: list[Piece] = []
    now, step, state = attempt.began, float(max(attempt.resumed_at, 0)), "start"
    for event in events:
        phases, t = _phases(event), min(event["t"], attempt.ended)
        following = _state_after(event, state)
        if not phases or t <= now:
            state = following
            continue
        told = max(now, t - sum(phases.values()))
        if told - now > ROUNDING_S:
            pieces.append(Piece(now, told, {state: told - now}))  # a line of the file is missing
        else:
            told = now
        after = float(event.get("step", step))
        pieces.append(Piece(told, t, _after_rollback(_scaled(phases, t - told), step, after, floor)))
        now, step, state = t, max(step, after), following
    if attempt.ended > now:
        pieces.append(Piece(now, attempt.ended, _tail(attempt, attempt.ended - now, state, floor)))
    return pieces


def _state_after(event: Event, state: str) -> str:
    """The phase that a rank is in when it has written this event."""
    return {"first_step": "compute", "trained": "finish", "end": "finish", "stop": "finish"}.get(event["kind"], state)


def _tail(attempt: AttemptSpan, seconds: float, state: str, floor: float) -> dict[str, float]:
    """What follows a rank's last word: the steps that it could not tell of; from its last sign of life on, recovery."""
    silent = min(seconds, float((attempt.fault or {}).get("silent_s") or 0.0))
    state = "lost_work" if state == "compute" and floor < math.inf else state
    return {state: seconds - silent, "recovery": silent}


def _after_rollback(phases: dict[str, float], before: float, after: float, floor: float) -> dict[str, float]:
    """The same seconds with the part beyond `floor` as lost work; steps in between share them alike."""
    if after <= floor:
        return phases
    lost = 1.0 if after <= before else min(1.0, (after - floor) / (after - before))
    kept = {name: seconds * (1 - lost) if name in REPEATED else seconds for name, seconds in phases.items()}
    return {**kept, "lost_work": sum(phases.values()) - sum(kept.values())}


def _phases(event: Event) -> dict[str, float]:
    found = event.get("phases")
    return {str(k): float(v) for k, v in found.items() if v > 0} if isinstance(found, Mapping) else {}


def _scaled(phases: dict[str, float], seconds: float) -> dict[str, float]:
    total = sum(phases.values())
    return {name: part * seconds / total for name, part in phases.items()}


def _gaps(attempts: Sequence[AttemptSpan], launcher: Sequence[Event]) -> list[Gap]:
    """What lay before, between and after the attempts."""
    marks = sorted(_marks(launcher))
    gaps: list[Gap] = []
    edges = [(-math.inf, 0), *((a.ended, a.world_size) for a in attempts)]
    starts = [*((a.began, a.world_size) for a in attempts), (math.inf, 0)]
    for (began, before), (ended, after) in zip(edges, starts, strict=True):
        inside = [(t, kind) for t, kind in marks if began - ROUNDING_S <= t < ended - ROUNDING_S]
        if not attempts or (not inside and math.inf in (-began, ended)):
            continue
        first = began if began > -math.inf else inside[0][0]
        last = ended if ended < math.inf else inside[-1][0]
        gaps += [Gap(piece, before or after) for piece in _between(first, last, inside, bool(launcher))]
    return gaps


def _marks(launcher: Iterable[Event]) -> Iterable[tuple[float, str]]:
    """(time, phase that begins there) of what the launcher told."""
    for event in launcher:
        if event["kind"] == "launch":
            command = float(event.get("began", event["t"]))
            pull, queue = float(event.get("image_pull_s", 0)), float(event.get("queue_s", 0))
            if queue:
                yield command - pull - queue, "queue"
            if pull:
                yield command - pull, "image_pull"
            yield command, "start"
        elif event["kind"] == "end":
            yield event["t"], "idle"


def _between(began: float, ended: float, marks: Sequence[tuple[float, str]], known: bool) -> Iterable[Piece]:
    """The pieces from one moment to another; before the first mark the launcher wound up, went on, or was dead."""
    begins = marks[0][1] if marks else ""
    state = {"": "recovery" if known else "idle", "idle": "finish"}.get(begins, "idle")
    for t, following in [*marks, (ended, "")]:
        if t > began:
            yield Piece(began, t, {state: t - began})
        began, state = max(began, t), following
