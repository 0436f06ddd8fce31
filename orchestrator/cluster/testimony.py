"""What a run's folder tells for a snapshot: where it stands, its faults, the errors of its ranks, its last lines."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.cluster.backend import LogLine
from orchestrator.cluster.cause import left_errors
from orchestrator.cluster.rank_logs import attempts_of
from orchestrator.track.runs import RunRecord, load_run

FAULTS = 20
EVENTS = 20
LINES = 50
"""Of each rank of the last attempt, at most so many."""
RANKS = 16
TAIL = 64 << 10
"""Bytes of a log that are looked at."""
KEPT = ("attempt", "t", "rank", "exit_code", "signal", "error", "phase", "step", "by_itself", "detected_by")


def testimony_of(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """`facts`: as of `track.status.status_of`. All that is long is cut."""
    record = load_run(folder)
    attempts = attempts_of(folder)
    last = attempts[-1] if attempts else 0
    errors = [{"attempt": last, **error} for error in left_errors(folder, last)]
    return {
        "facts": dict(facts),
        "end": _end(record),
        "faults": [_kept(event) for event in record.launcher if event["kind"] == "fault"][-FAULTS:],
        "events": [*record.launcher[-EVENTS:], *record.events[-EVENTS:]],
        "errors": sorted(errors, key=lambda error: error.get("t") or 0.0),
        "lines": last_lines(folder, last, [error["rank"] for error in errors]),
    }


def _end(record: RunRecord) -> dict[str, Any]:
    """How the run ended, as result.json says; without its figures."""
    known = ("state", "exit_code", "rank", "error")
    return {key: record.result[key] for key in known if key in record.result}


def _kept(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: event.get(key) for key in KEPT}


def last_lines(folder: Path, attempt: int, first: Sequence[int]) -> list[dict[str, Any]]:
    """The last lines of the ranks of an attempt, those of `first` before the others."""
    paths = {int(path.stem[5:]): path for path in folder.glob(f"logs/attempt_{attempt}/rank_*.log") if _number(path)}
    order = [rank for rank in dict.fromkeys([*first, *sorted(paths)]) if rank in paths][:RANKS]
    return [{"attempt": attempt, "rank": rank, "lines": _tail(paths[rank])} for rank in order]


def _number(path: Path) -> bool:
    return path.stem.removeprefix("rank_").isdecimal()


def _tail(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read(TAIL).decode(errors="replace").splitlines()[-LINES:]
    except OSError:
        return []


def told_lines(lines: Iterable[LogLine]) -> list[dict[str, Any]]:
    """The same from the lines of all ranks, as a backend reads them; of the newest attempt."""
    kept: dict[tuple[int, int | None], deque[str]] = {}
    for line in lines:
        kept.setdefault((line.attempt, line.rank), deque(maxlen=LINES)).append(line.text)
    newest = max((attempt for attempt, _ in kept), default=0)
    found = [(rank, texts) for (attempt, rank), texts in kept.items() if attempt == newest]
    return [{"attempt": newest, "rank": rank, "lines": list(texts)} for rank, texts in found][:RANKS]
