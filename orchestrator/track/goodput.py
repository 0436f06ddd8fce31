"""What a run's time came to: its split by phase in seconds, process-hours and money, its goodput, its wasted work.

Goodput is the share of the wall time in which steps were computed that count: computing and waiting for the other
ranks' gradients, without the steps that a rollback made the run compute again (the definition of Google's ML goodput:
productive step time / wall time). Idle time, in which nothing ran, is part of the wall time and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from orchestrator.track.runs import Event, RunRecord, history
from orchestrator.track.timeline import PHASES, AttemptSpan, Piece, Timeline, read_timeline

USEFUL = ("compute", "communication_wait")
FREE = ("idle", "queue")
"""Phases in which no process is held."""
STRAGGLES_FROM = 1.2
"""A rank whose steps take so many times the median's is named."""
JUDGED_FROM = 20
"""Steps; of fewer, a busy machine makes anyone look slow."""

Split = dict[str, float]


@dataclass(frozen=True, slots=True)
class Goodput:
    """The sums of a timeline; every split is in the order of PHASES and without its empty phases."""

    wall_s: float
    seconds: Split
    """Of the run: in each attempt the mean of its ranks. Sums to `wall_s`."""
    process_s: Split
    """Of all processes together."""
    cost: Split | None
    """In the currency of the prices, None where a device has none."""

    @property
    def value(self) -> float:
        return sum(self.seconds.get(phase, 0.0) for phase in USEFUL) / self.wall_s if self.wall_s else 0.0

    @property
    def busy_s(self) -> float:
        """Wall time without idle."""
        return self.wall_s - self.seconds.get("idle", 0.0)

    @property
    def process_hours(self) -> float:
        return sum(self.process_s.values()) / 3600

    @property
    def total_cost(self) -> float | None:
        return None if self.cost is None else sum(self.cost.values())


def measure(timeline: Timeline, prices: Mapping[str, float]) -> Goodput:
    """`prices`: of a process's hour by the name of its device."""
    bills = list(_bills(timeline))
    wall = timeline.ended - timeline.began
    seconds = add_up((bill.phase, bill.wall_s) for bill in bills)
    held = [bill for bill in bills if bill.process_s]
    process_s = add_up((bill.phase, bill.process_s) for bill in held)
    if not all(bill.device in prices for bill in held):
        return Goodput(wall, seconds, process_s, None)
    cost = add_up((bill.phase, bill.process_s / 3600 * prices[bill.device]) for bill in held)
    return Goodput(wall, seconds, process_s, cost)


@dataclass(frozen=True, slots=True)
class Bill:
    """What one phase took of the wall time, and of how many processes on which device."""

    phase: str
    wall_s: float
    process_s: float
    device: str


def _bills(timeline: Timeline) -> Iterator[Bill]:
    told = [device for attempt in timeline.attempts for device in attempt.devices.values()]
    usual = told[0] if told else "unknown"
    for attempt in timeline.attempts:
        devices = attempt.devices
        for rank, pieces in attempt.pieces.items():
            for phase, spent in add_up(part for piece in pieces for part in piece.seconds.items()).items():
                yield Bill(phase, spent / attempt.world_size, spent, devices.get(rank, usual))
    for gap in timeline.gaps:
        for phase, spent in gap.piece.seconds.items():
            yield Bill(phase, spent, 0.0 if phase in FREE else spent * gap.world_size, usual)


def measure_run(run: RunRecord) -> Goodput:
    """The sums of a run's record, priced by its own config."""
    return measure(read_timeline(run.ranks, run.launcher), prices_of(run))


def summary(came: Goodput) -> dict[str, float]:
    """What a mirror shows of it."""
    cost = {} if came.total_cost is None else {"time/cost": round(came.total_cost, 4)}
    seconds = {f"time/{phase}_s": round(spent, 3) for phase, spent in came.seconds.items()}
    hours = {"time/process_hours": round(came.process_hours, 4), "time/wall_s": round(came.wall_s, 3)}
    return {"goodput": round(came.value, 4), **seconds, **hours, **cost}


def rank_split(timeline: Timeline, rank: int) -> Split:
    """Seconds of one rank over the wall time of the run; idle where it was no part of an attempt."""
    parts = [part for gap in timeline.gaps for part in gap.piece.seconds.items()]
    for attempt in timeline.attempts:
        absent = [Piece(attempt.began, attempt.ended, {"idle": attempt.ended - attempt.began})]
        parts += [part for piece in attempt.pieces.get(rank, absent) for part in piece.seconds.items()]
    return add_up(parts)


def add_up(parts: Iterable[tuple[str, float]]) -> Split:
    """Sums by phase, in the order of PHASES, without the empty ones."""
    total: Split = {}
    for phase, spent in parts:
        total[phase] = total.get(phase, 0.0) + spent
    known = [*PHASES, *(phase for phase in total if phase not in PHASES)]
    return {phase: total[phase] for phase in known if total.get(phase, 0.0) > 0}


def prices_of(run: RunRecord) -> dict[str, float]:
    """The table of a run's own config."""
    return read_prices((run.config.get("cluster") or {}).get("prices") or [])


def read_prices(entries: Sequence[str]) -> dict[str, float]:
    """``['cpu=0.04']`` as a table."""
    return {name: float(price) for name, _, price in (entry.rpartition("=") for entry in entries)}


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank whose own computing takes longer than that of its peers."""

    rank: int
    ratio: float
    step_s: float

    def __str__(self) -> str:
        return f"rank {self.rank} takes {self.ratio:.2f} × the median"


def stragglers(attempt: AttemptSpan) -> list[Straggler]:
    """Ranks of an attempt whose steps take STRAGGLES_FROM times the lower median's or more, the slowest first."""
    step_s = {rank: own for rank in attempt.pieces if (own := _own_step_s(attempt.ranks.get(rank, [])))}
    if len(step_s) < 2:
        return []
    middle = median_low(step_s.values())
    found = [Straggler(rank, own / middle, own) for rank, own in step_s.items() if own > STRAGGLES_FROM * middle]
    return sorted(found, key=lambda straggler: -straggler.ratio)


def _own_step_s(events: Sequence[Event]) -> float:
    """Mean seconds that a rank computed per step, as far as it told; the step that warms up is left out."""
    told = [e for e in events if isinstance(e.get("phases"), dict) and e["kind"] in ("step", "save", "eval")]
    told = told[1:] if len(told) > 1 else told
    first = next((e["step"] for e in events if e["kind"] == "step"), 0)
    steps = max((e["step"] for e in told), default=0) - first
    return sum(e["phases"].get("compute", 0.0) for e in told) / steps if steps >= JUDGED_FROM else 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """What was computed: steps and samples that count, and those computed again."""

    steps: int
    wasted_steps: int
    wasted_samples: int
    epochs: dict[int, int]
    """Samples by epoch (from 1) in its committed steps, as far as logged."""


def count_work(timeline: Timeline, samples_per_epoch: int, steps_per_epoch: int) -> Work:
    """Steps by attempt against the step from which the next one went on; samples by the cut of an epoch."""
    ends = [_last_step(attempt) for attempt in timeline.attempts]
    wasted: list[tuple[int, int]] = []
    for number, last in enumerate(ends):
        later = [a.resumed_at for a in timeline.attempts[number + 1 :] if a.resumed_at >= 0]
        if later and last > min(later):
            wasted.append((max(min(later), timeline.attempts[number].resumed_at), last))
    first_rank = [event for attempt in timeline.attempts for event in attempt.ranks.get(0, [])]
    epochs: dict[int, int] = {}
    for event in history(first_rank):
        if event["kind"] == "step" and "train/images" in event:
            epoch = (event["step"] - 1) // steps_per_epoch + 1
            epochs[epoch] = epochs.get(epoch, 0) + event["train/images"]
    samples = sum(_samples(b, samples_per_epoch, steps_per_epoch) - _samples(a, samples_per_epoch, steps_per_epoch)
                  for a, b in wasted)  # fmt: skip
    return Work(ends[-1] if ends else 0, sum(b - a for a, b in wasted), samples, epochs)


def _last_step(attempt: AttemptSpan) -> int:
    told = [int(e["step"]) for events in attempt.ranks.values() for e in events if "step" in e]
    fault = attempt.fault or {}
    return max([attempt.resumed_at, *told, *([fault["step"]] if isinstance(fault.get("step"), int) else [])])


def _samples(step: int, samples_per_epoch: int, steps_per_epoch: int) -> int:
    """Samples of the first `step` steps: those of an epoch differ in size by one at most."""
    epochs, rest = divmod(step, steps_per_epoch)
    return epochs * samples_per_epoch + rest * samples_per_epoch // steps_per_epoch


def recoveries(timeline: Timeline) -> list[dict[str, Any]]:
    """Each fault, its cause, and the seconds until the first new step began, where one did."""
    found: list[dict[str, Any]] = []
    for attempt in timeline.attempts:
        if attempt.fault is None:
            continue
        begins = [e["t"] for a in timeline.attempts if a.number > attempt.number
                  for events in a.ranks.values() for e in events if e["kind"] == "first_step"]  # fmt: skip
        known = {key: attempt.fault.get(key) for key in ("t", "rank", "error", "phase", "step", "exit_code")}
        seconds = round(min(begins) - attempt.fault["t"], 3) if begins else None
        found.append({**known, "attempt": attempt.number, "recovery_s": seconds})
    return found
