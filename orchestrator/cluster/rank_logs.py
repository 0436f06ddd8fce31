"""The logs in a run's folder as numbered lines of all ranks, while they are written and across restarts."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from heapq import merge
from pathlib import Path

from orchestrator.cluster.backend import LogLine
from orchestrator.redact import redactor

POLL_S = 0.1
CHUNK = 1 << 20
STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")
Stamped = tuple[str, LogLine]
"""A line and the time of the last one before it, or of itself, that bears one."""


class RankLog:
    """One log, read as far as it goes; a line is read once, when its end is there."""

    def __init__(self, path: Path, attempt: int, rank: int):
        self._path, self._attempt, self._rank = path, attempt, rank
        self._offset, self._number, self._rest, self._stamp = 0, 0, b"", ""
        self._clean = redactor()

    def read(self, last: bool) -> Iterator[Stamped]:
        """What has come since. `last`: nothing follows, so that a line without an end is one, too."""
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            while chunk := file.read(CHUNK):
                self._offset += len(chunk)
                whole, newline, rest = (self._rest + chunk).rpartition(b"\n")
                self._rest = rest
                if newline:
                    yield from self._lines(whole)
        if last and self._rest:
            whole, self._rest = self._rest, b""
            yield from self._lines(whole)

    def _lines(self, whole: bytes) -> Iterator[Stamped]:
        for text in whole.decode(errors="replace").split("\n"):
            self._number += 1
            stamp = STAMP.match(text)
            self._stamp = stamp[0] if stamp else self._stamp
            yield self._stamp, LogLine(self._attempt, self._rank, self._number, self._clean(text))


def read_logs(folder: Path, rank: int | None, is_alive: Callable[[], bool]) -> Iterator[LogLine]:
    """All lines, those of earlier attempts first, the ranks of one put in order by time.

    Goes on as long as `is_alive` says that the run does. `rank`: of this one alone.
    """
    logs: dict[Path, RankLog] = {}
    over = 0  # attempts up to this one have been read to their end
    while True:
        alive = is_alive()  # asked before reading: what is written afterwards is read at the next turn
        attempts = attempts_of(folder)
        for attempt in [number for number in attempts if number > over]:
            ended = attempt < attempts[-1] or not alive  # ranks are gone before the next attempt's folder comes
            found = [log.read(ended) for log in _logs_of(folder, attempt, rank, logs)]
            yield from (line for _, line in merge(*found, key=lambda stamped: stamped[0]))
            over = attempt if ended else over
        if not alive:
            return
        time.sleep(POLL_S)


def attempts_of(folder: Path) -> list[int]:
    """Numbers of the attempts that have begun, in order."""
    return sorted(int(path.name.removeprefix("attempt_")) for path in folder.glob("logs/attempt_*"))


def _logs_of(folder: Path, attempt: int, rank: int | None, known: dict[Path, RankLog]) -> list[RankLog]:
    paths = {int(path.stem.removeprefix("rank_")): path for path in folder.glob(f"logs/attempt_{attempt}/rank_*.log")}
    wanted = {number: path for number, path in sorted(paths.items()) if rank in (None, number)}
    return [known.setdefault(path, RankLog(path, attempt, number)) for number, path in wanted.items()]
