"""Reads a run folder, whole or half-written, into one record."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = dict[str, Any]

PER_STEP = frozenset({"step", "eval", "save", "data"})
"""Kinds of events that an attempt repeats when it goes back to a checkpoint."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All that a run folder tells; parts that are not there yet are empty."""

    folder: Path
    bundle: dict[str, Any] = field(default_factory=dict)
    """run.json"""
    result: dict[str, Any] = field(default_factory=dict)
    """result.json"""
    events: list[Event] = field(default_factory=list)
    """Rank 0's, in the order of writing."""
    peers: dict[int, list[Event]] = field(default_factory=dict)
    """Those of the other ranks."""
    launcher: list[Event] = field(default_factory=list)
    """events/launcher.jsonl"""
    evaluation: dict[str, Any] | None = None
    """evaluation.json"""

    @property
    def ranks(self) -> dict[int, list[Event]]:
        """The events of every rank."""
        return {**({0: self.events} if self.events else {}), **self.peers}

    @property
    def run_id(self) -> str:
        return str(self.bundle.get("run_id") or self.result.get("run_id") or self.folder.name)

    @property
    def name(self) -> str:
        return str(self.bundle.get("name") or self.run_id)

    @property
    def state(self) -> str:
        """`running`, `done`, `failed` or `stopped`; `starting` before the first result."""
        return str(self.result.get("state") or ("running" if self.events else "starting"))

    @property
    def config(self) -> dict[str, Any]:
        return self.bundle.get("config") or {}

    @property
    def data(self) -> dict[str, dict[str, Any]]:
        """The shard sets by split."""
        return self.bundle.get("data") or {}

    @property
    def sources(self) -> dict[str, str]:
        """Per dotted key, the file that gave the value, or `override`."""
        return self.bundle.get("sources") or {}


def load_run(folder: Path) -> RunRecord:
    """Read a run folder as far as it is written; a half-written file counts as not there."""
    return RunRecord(
        folder=folder,
        bundle=_read_json(folder / "run.json") or {},
        result=_read_json(folder / "result.json") or {},
        events=read_events(folder / "events" / "rank_0.jsonl"),
        peers={rank: read_events(path) for path in folder.glob("events/rank_*.jsonl") if (rank := _rank_of(path))},
        launcher=read_events(folder / "events" / "launcher.jsonl"),
        evaluation=_read_json(folder / "evaluation.json"),
    )


def _rank_of(path: Path) -> int:
    number = path.stem.removeprefix("rank_")
    return int(number) if number.isdecimal() else 0


def read_events(path: Path) -> list[Event]:
    """The events of one rank; a line torn by a kill is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [event for line in text.splitlines() if (event := _parse(line)) is not None]


def history(events: Iterable[Event]) -> list[Event]:
    """Each step once: what a later attempt did again replaces what an earlier one had done.

    An attempt that resumes at step s takes back what the earlier ones recorded beyond s.
    """
    kept: list[Event] = []
    attempt: object = None
    for event in events:
        if event.get("attempt", attempt) != attempt:
            attempt = event["attempt"]
            resumed = resumed_step(event)
            kept = [e for e in kept if e["kind"] not in PER_STEP or e.get("step", 0) <= resumed]
        kept.append(event)
    return kept


def resumed_step(first: Event) -> float:
    """The step at which an attempt went on, by its first event: its begin at s, or something done in a later step."""
    if "step" not in first:
        return math.inf
    return first["step"] if first["kind"] in ("start", "wandb") else first["step"] - 1


def series(events: Iterable[Event], kind: str, key: str) -> tuple[list[float], list[float]]:
    """The points (epoch, value) of one metric; a fraction counts as its value, a missing figure as no point."""
    points = [(e.get("epoch", e.get("step", 0)), value(e.get(key))) for e in events if e.get("kind") == kind]
    known = [(float(x), y) for x, y in points if y is not None]
    return [x for x, _ in known], [y for _, y in known]


def value(metric: Any) -> float | None:
    """A metric as a number: `{hits, count, value}` or a plain figure."""
    number = metric.get("value") if isinstance(metric, Mapping) else metric
    return float(number) if isinstance(number, int | float) and not isinstance(number, bool) else None


def _parse(line: str) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
