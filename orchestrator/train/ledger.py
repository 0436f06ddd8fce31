"""The events of a rank as JSON lines, and the split of its wall time into phases."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.files import disk_errors


class Ledger:
    """Appends events to ``events/rank_N.jsonl``; a torn last line of a killed attempt is closed first."""

    def __init__(self, folder: Path, rank: int, attempt: int):
        self._path = path = folder / "events" / f"rank_{rank}.jsonl"
        self._attempt = attempt
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
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
    """Seconds by phase of one attempt; what no phase claims is `other`, so that the sum is the wall time."""

    def __init__(self, began: float):
        """`began`: time.time() at which the attempt started."""
        self._began = began
        self.seconds: dict[str, float] = {}

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def split(self) -> dict[str, float]:
        """Seconds by phase, summing to the wall time so far."""
        wall = time.time() - self._began
        known = {name: round(seconds, 3) for name, seconds in self.seconds.items()}
        return {**known, "other": round(max(0.0, wall - sum(known.values())), 3)}
