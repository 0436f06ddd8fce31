"""Whether Ray Train starts a run again: our table of exit codes in place of its counter."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.cluster.cause import FINAL, Ended, killed, left_errors
from orchestrator.cluster.journal import Journal
from orchestrator.cluster.local import next_attempt
from orchestrator.cluster.ray.meeting import put_off, stopping_file
from orchestrator.cluster.restarts import Attempt, decide
from orchestrator.cluster.watch import read_signs, steps_done
from orchestrator.config import ClusterConfig
from orchestrator.errors import EXIT_INTERRUPTED, EXIT_RESIZED, EXIT_STOPPED, EXIT_TERMINATED, EXIT_TRANSIENT

NOT_COUNTED = {EXIT_TERMINATED, EXIT_INTERRUPTED, EXIT_RESIZED}
"""Ends after saving that nobody asked the job for: its node is taken away, so it goes on elsewhere."""
SAME_TIME_S = 1.0
LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|connectFullMesh|remote process exited|timed out", re.I
)
"""What a rank says whose peer's machine is gone before Ray has noticed."""


class RunEnded(Exception):
    """The run is over; Ray carries it from the controller to the driver."""

    def __init__(self, ended: Ended):
        super().__init__(ended.error or f"code {ended.exit_code}")
        self.ended = ended

    def __reduce__(self):
        return type(self), (self.ended,)


@dataclass(slots=True)
class Judge:
    """Lives in the controller for one job; a job that is sent again has all its restarts again."""

    folder: Path
    cluster: ClusterConfig
    attempts: list[Attempt] = field(default_factory=list)

    def judge(self, number: int | None, told: Mapping[int, Ended], gone: Mapping[int, str]) -> None:
        """An attempt has failed. Raises RunEnded where no other one follows.

        `told`: how ranks ended; `gone`: ranks whose worker ended without a word, and what Ray says of it.
        """
        number = next_attempt(self.folder) - 1 if number is None else number
        ended = first_end(told, gone, left_errors(self.folder, number))
        if ended.exit_code in NOT_COUNTED:
            if ended.exit_code != EXIT_RESIZED and _is_stopping(self.folder):
                raise RunEnded(Ended(EXIT_STOPPED))
            return
        signs = read_signs(self.folder, number, range(max([*told, *gone]) + 1), 0.0)
        self.attempts.append(Attempt(ended, steps_done(signs)))
        self._note(number, ended)
        verdict = decide(self.attempts, self.cluster.max_restarts, self.cluster.backoff_s)
        if verdict.ended:
            raise RunEnded(verdict.ended)
        put_off(self.folder, verdict.pause_s)

    def _note(self, number: int, ended: Ended) -> None:
        Journal(self.folder).write(
            "fault",
            number,
            rank=ended.rank,
            exit_code=ended.exit_code,
            signal=ended.signal,
            error=ended.error,
            by_itself=ended.by_itself,
            phase=None,
            step=self.attempts[-1].step,
            detected_by="ray",
            silent_s=0.0,
        )


def _is_stopping(folder: Path) -> bool:
    """Whether the driver is told to go, too: where all pods are, it may hear of it a moment after the ranks."""
    until = time.monotonic() + SAME_TIME_S
    while not stopping_file(folder).exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def first_end(told: Mapping[int, Ended], gone: Mapping[int, str], errors: Sequence[Mapping[str, Any]]) -> Ended:
    """The end that the others followed from: what no retry mends, then what was killed, then the earliest error."""
    ends = [told[rank] for rank in sorted(told)]
    clear = [end for end in ends if end.exit_code in FINAL] or [end for end in ends if end.signal or end.hung]
    if clear:
        return clear[0]
    if gone:
        rank = min(gone)
        return replace(killed(rank, signal.SIGKILL, False), error=f"its worker is gone: {gone[rank]}")
    t = {error["rank"]: error["t"] for error in errors}
    return _unless_peer_lost(min(ends, key=lambda end: (t.get(end.rank, float("inf")), end.rank or 0)))


def _unless_peer_lost(ended: Ended) -> Ended:
    if ended.exit_code == 1 and LOST_PEER.search(ended.error or ""):
        return replace(ended, exit_code=EXIT_TRANSIENT, by_itself=False)
    return ended
