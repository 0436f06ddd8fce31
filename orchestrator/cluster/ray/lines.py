"""The lines of a run's ranks from the logs of its jobs: in order, nothing twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from orchestrator.cluster.backend import LogLine
from orchestrator.cluster.lines import read_lines
from orchestrator.cluster.rank_logs import read_logs
from orchestrator.errors import TransientError

PATIENCE_S = 60.0
"""How long a dashboard may be away while its log is followed."""
AGAIN_S = 1.0


def ended_lines(texts: Iterable[str]) -> Iterator[LogLine]:
    """Of whole logs, the oldest first."""
    for text in texts:
        yield from _log_lines(text.split("\n"))


class Followed(Protocol):
    """Of a dashboard: what following takes."""

    def follow(self, submission_id: str) -> Iterator[str]: ...


def followed_lines(
    dashboard: Followed, submission_id: str, is_living: Callable[[], bool], again_s: float = AGAIN_S
) -> Iterator[LogLine]:
    """Of a job under way until it ends; after an outage from where it was."""
    seen = dict[tuple[int, int | None], int]()
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            living = is_living()
            for line in _log_lines(_whole(dashboard.follow(submission_id))):
                until = time.monotonic() + PATIENCE_S
                place = (line.attempt, line.rank)
                if line.number > seen.get(place, 0):
                    seen[place] = line.number
                    yield line
            if not living:
                return
        except TransientError:
            if time.monotonic() > until:
                raise
        time.sleep(again_s)


def with_older(folder: Path | None, lines: Iterator[LogLine]) -> Iterator[LogLine]:
    """The same, after those of attempts whose jobs the cluster no longer knows: a folder that is here has them."""
    first = next(lines, None)
    if folder is not None:
        older = read_logs(folder, None, lambda: False)
        yield from takewhile(lambda line: first is None or line.attempt < first.attempt, older)
    if first is not None:
        yield first
        yield from lines


def _log_lines(lines: Iterable[str]) -> Iterator[LogLine]:
    for said in read_lines(lines):
        if said.kind == "log":
            yield LogLine(said.attempt, said.rank, said.number, said.text)


def _whole(pieces: Iterable[str]) -> Iterator[str]:
    """Lines of a text that comes in pieces."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    if rest:
        yield rest
