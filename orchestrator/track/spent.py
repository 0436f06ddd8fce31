"""The report's part about time: a bar over the wall time, the table of its split, the faults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.track.goodput import Goodput, measure, prices_of, recoveries, stragglers
from orchestrator.track.runs import RunRecord
from orchestrator.track.timeline import Piece, Timeline, read_timeline
from orchestrator.track.words import duration, first_line, moment, percent, share

MEANING = {
    "compute": ("compute", "forward, backward and update of steps that count"),
    "communication_wait": ("wait for ranks", "after the own gradients, for those of the other ranks"),
    "data_wait": ("wait for data", "until the next batch was there"),
    "evaluation": ("evaluation", "all of data.val"),
    "checkpoint_stall": ("checkpoint stall", "steps held up by a save"),
    "finish": ("finish", "pictures, mirror and report after the last step"),
    "compile": ("compile", "the first step of a compiled network"),
    "import": ("import", "until a new process had its libraries"),
    "start": ("start", "config, group, model, checkpoint, first batch"),
    "image_pull": ("image pull", "of the container"),
    "queue": ("queue", "until the cluster had room"),
    "lost_work": ("lost work", "steps that had to be computed again"),
    "recovery": ("recovery", "from a fault to the next start"),
    "idle": ("idle", "nothing ran"),
}
"""Name and meaning of each phase, in the order of the bar from its foot up: what is useful lies lowest."""
COLUMNS = 180
HEIGHT = 100
LONGEST_IDLE = 0.05
"""A pause is drawn no longer than this share of the rest: a night would leave no room for the day."""
FAULTS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Stretch:
    """A piece of time where the bar shows it: from `left` to `right` in seconds of the bar, `weight` of the ranks."""

    left: float
    right: float
    seconds: dict[str, float]
    weight: float


def spent(run: RunRecord) -> dict[str, Any] | None:
    """Everything that the page says about time; None where no event tells of it."""
    timeline = read_timeline(run.ranks, run.launcher, alive=run.state == "running")
    told = any("phases" in event for events in run.ranks.values() for event in events)
    if not told or timeline.ended <= timeline.began:
        return None
    cluster = run.config.get("cluster") or {}
    came = measure(timeline, prices_of(run))
    scale = Scale(timeline)
    faults = recoveries(timeline)
    return {
        "bar": draw_bar(timeline, scale),
        "faults": [_fault(fault, scale) for fault in faults[:FAULTS_SHOWN]],
        "marks": [round(scale.share(fault["t"]), 2) for fault in faults],
        "more_faults": max(0, len(faults) - FAULTS_SHOWN),
        "rows": rows(came, cluster.get("currency") or ""),
        "priced": came.cost is not None,
        "goodput": percent(came.value, 1),
        "wall": duration(came.wall_s),
        "busy": duration(came.busy_s) if came.seconds.get("idle") else "",
        "busy_goodput": percent(share(came.value * came.wall_s, came.busy_s), 1),
        "from": moment(timeline.began),
        "to": moment(timeline.ended),
        "shortened": scale.shortened,
        "stragglers": [str(found) for attempt in timeline.attempts[-1:] for found in stragglers(attempt)],
    }


def rows(came: Goodput, currency: str) -> list[dict[str, str]]:
    """The table of the split, largest first, and its sum."""
    order = sorted(came.seconds, key=lambda phase: -came.seconds[phase])
    found = [_row(came, phase, currency) for phase in order]
    total = {"phase": "", "name": "wall time", "meaning": "", "seconds": duration(came.wall_s), "share": "100.0 %"}
    cost = came.total_cost
    money = "" if cost is None else f"{_money(cost)} {currency}"
    return [*found, {**total, "process_hours": f"{came.process_hours:.3g}", "cost": money}]


def _row(came: Goodput, phase: str, currency: str) -> dict[str, str]:
    name, meaning = MEANING.get(phase, (phase, ""))
    cost = (came.cost or {}).get(phase)
    return {
        "phase": phase,
        "name": name,
        "meaning": meaning,
        "seconds": duration(came.seconds[phase]),
        "share": percent(share(came.seconds[phase], came.wall_s), 1),
        "process_hours": f"{came.process_s.get(phase, 0.0) / 3600:.3g}",
        "cost": "" if cost is None else f"{_money(cost)} {currency}",
    }


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.4f}"


def _fault(fault: dict[str, Any], scale: Scale) -> dict[str, Any]:
    where = f"rank {fault['rank']}" if fault["rank"] is not None else ""
    again = "" if fault["recovery_s"] is None else f"{fault['recovery_s']:.1f} s"
    at = ", ".join(text for text in (where, f"step {fault['step']}" if fault["step"] is not None else "") if text)
    return {
        "at": at,
        "what": first_line(fault["error"]),
        "when": moment(fault["t"]),
        "phase": fault["phase"] or "",
        "again": again,
        "left": round(scale.share(fault["t"]), 2),
    }


class Scale:
    """From a moment to its place in the bar, where a long idle gap takes little room."""

    def __init__(self, timeline: Timeline):
        idle = [gap.piece for gap in timeline.gaps if "idle" in gap.piece.seconds]
        whole = timeline.ended - timeline.began
        limit = LONGEST_IDLE * max(whole - sum(piece.ended - piece.began for piece in idle), 1e-9)
        self._began = timeline.began
        self._cuts = [(p.began, p.ended, p.ended - p.began - limit) for p in idle if p.ended - p.began > limit]
        self.width = self.place(timeline.ended)

    @property
    def shortened(self) -> bool:
        return bool(self._cuts)

    def place(self, t: float) -> float:
        """Seconds of the bar from its left end."""
        cut = sum(left_out * min(1.0, max(0.0, (t - began) / (ended - began))) for began, ended, left_out in self._cuts)
        return t - self._began - cut

    def share(self, t: float) -> float:
        """Per cent of the bar's width."""
        return 100 * self.place(t) / self.width


def draw_bar(timeline: Timeline, scale: Scale) -> str:
    """Stacked columns as SVG, one path a phase; colours come from the page's classes."""
    columns = [_stack(column) for column in _fill(_stretches(timeline, scale), scale.width)]
    paths = [f'<path class="ph-{phase}" d="{path}"/>' for phase in MEANING if (path := _path(columns, phase))]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="passage" role="img" aria-label="phases over the wall time" '
        f'viewBox="0 0 {COLUMNS} {HEIGHT}" preserveAspectRatio="none">{"".join(paths)}</svg>'
    )


def _stretches(timeline: Timeline, scale: Scale) -> Iterator[Stretch]:
    def stretch(piece: Piece, weight: float) -> Stretch:
        return Stretch(scale.place(piece.began), scale.place(piece.ended), piece.seconds, weight)

    for gap in timeline.gaps:
        yield stretch(gap.piece, 1.0)
    for attempt in timeline.attempts:
        for pieces in attempt.pieces.values():
            yield from (stretch(piece, 1 / attempt.world_size) for piece in pieces)


def _fill(stretches: Iterator[Stretch], width: float) -> list[dict[str, float]]:
    """Seconds by phase of each column."""
    columns: list[dict[str, float]] = [{} for _ in range(COLUMNS)]
    step = width / COLUMNS
    for stretch in stretches:
        first, last = int(stretch.left / step), min(COLUMNS - 1, int(stretch.right / step))
        total, length = sum(stretch.seconds.values()), stretch.right - stretch.left
        for number in range(first, last + 1):
            common = min(stretch.right, (number + 1) * step) - max(stretch.left, number * step)
            if common <= 0 or length <= 0 or total <= 0:
                continue
            for phase, seconds in stretch.seconds.items():
                part = stretch.weight * seconds / total * common
                columns[number][phase] = columns[number].get(phase, 0.0) + part
    return columns


def _stack(column: dict[str, float]) -> dict[str, tuple[int, int]]:
    """From foot to head of each phase, in whole parts of the height from the top."""
    total, now, found = sum(column.values()), 0.0, {}
    for phase in MEANING:
        seconds = column.get(phase, 0.0)
        if seconds > 0:
            foot, now = now, now + seconds / total
            found[phase] = (round(HEIGHT * (1 - now)), round(HEIGHT * (1 - foot)))
    return found


def _path(columns: Sequence[dict[str, tuple[int, int]]], phase: str) -> str:
    """Rectangles of a phase; neighbours of equal height are one."""
    parts, number = [], 0
    while number < len(columns):
        span, begin = columns[number].get(phase), number
        while number < len(columns) and columns[number].get(phase) == span:
            number += 1
        if span and span[1] > span[0]:
            parts.append(f"M{begin} {span[0]}h{number - begin}v{span[1] - span[0]}h{begin - number}z")
    return "".join(parts)
