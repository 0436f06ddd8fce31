"""The events of a rank as JSON lines, and the split of its wall time into phases."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.files import disk_errors, ends_torn


class Ledger:
    """Appends events to ``events/rank_N.jsonl``; a torn last line of a killed attempt is closed first."""

    def __init__(self, folder: Path, rank: int, attempt: int):
        self._path = path = folder / "events" / f"rank_{rank}.jsonl"
        self._attempt = attempt
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = ends_torn(path)
            # Unbuffered: what a full disk refused must not fail once more when the file is closed.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        if torn:
            self._append(b"\n")

    def write(self, kind: str, **facts: Any) -> None:
        event = {"t": round(time.time(), 3), "attempt": self._attempt, "kind": kind, **facts}
        self._append((json.dumps(event) + "\n").encode())

    def _append(self, content: bytes) -> None:
        with disk_errors(self._path):
            while content:
                content = content[self._file.write(content) :]

    def close(self) -> None:
        self._file.close()


class PhaseClock:
    """Splits the wall time of an attempt into phases without remainder: what nobody claims is `rest`'s."""

    def __init__(self, began: float):
        """`began`: time.time() at which the attempt started."""
        self.began = round(began, 3)
        self.rest = "start"
        """The phase that this rank is in where no other claims the time; changed right after `take`."""
        self.taken: dict[str, float] = {}
        """Seconds by phase that `take` has given out."""
        self._mark = time.perf_counter() - max(0.0, time.time() - began)
        self._claimed: dict[str, float] = {}
        self._sources: dict[str, Source] = {}

    def add(self, phase: str, seconds: float) -> None:
        self._claimed[phase] = self._claimed.get(phase, 0.0) + seconds

    def follow(self, phase: str, read: Callable[[], float]) -> None:
        """From now on, what the growing sum `read` gains belongs to `phase`."""
        self._sources[phase] = Source(read, read())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; they sum to the time since then."""
        for phase, source in self._sources.items():
            self.add(phase, source.gain())
        now = time.perf_counter()
        split = without_remainder(self._claimed, now - self._mark, self.rest)
        self._mark, self._claimed = now, {}
        for phase, seconds in split.items():
            self.taken[phase] = self.taken.get(phase, 0.0) + seconds
        return {phase: round(seconds, 6) for phase, seconds in split.items()}

    def split(self) -> dict[str, float]:
        """Seconds by phase of the whole attempt so far, summing to its wall time."""
        split = dict(self.taken)
        for phase, seconds in without_remainder(self._claimed, time.perf_counter() - self._mark, self.rest).items():
            split[phase] = split.get(phase, 0.0) + seconds
        return {phase: round(seconds, 3) for phase, seconds in split.items()}


@dataclass(slots=True)
class Source:
    """A sum of seconds that grows somewhere else."""

    read: Callable[[], float]
    last: float

    def gain(self) -> float:
        """What it grew by since the last call."""
        earlier, self.last = self.last, self.read()
        return self.last - earlier


def without_remainder(claimed: dict[str, float], wall: float, rest: str) -> dict[str, float]:
    """Seconds by phase that sum to `wall`: `rest` gets what is left, claims that overlap shrink alike."""
    total = sum(claimed.values())
    if total > wall:
        return {phase: seconds * wall / total for phase, seconds in claimed.items()}
    split = {phase: seconds for phase, seconds in claimed.items() if seconds > 0}
    split[rest] = split.get(rest, 0.0) + wall - total
    return split
