"""What the first rank is asked besides by signals: a deadline, a stop file, the launcher's orders."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from orchestrator.train.orders import Asked, Request, orders_file

LOOK_S = 0.02
"""Least time between two looks for the stop file."""
RECENT_STEPS = 20
SAVE_GUESS_S = 1.0
"""What a save is taken to last before one was measured."""
END_S = 0.5
"""What the processes' own end takes after the last save."""
SLACK = 1.5
"""A coming step or save may last that many times the longest one so far."""


class Requests:
    """Asked at each border by the first rank; the other ranks hear of it when all agree."""

    def __init__(self, folder: Path, attempt: int, deadline: float | None = None):
        """`deadline`: time.time() at which the run must have ended, where no launcher's orders tell another one."""
        self._asked = Asked(orders_file(folder, attempt))
        self._deadline = self._asked.deadline or deadline
        self._file = folder / "stop"
        self._looked = self._border = 0.0
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._save_s = 0.0
        self._stopping = False

    def note_border(self) -> None:
        """A step has ended: its length tells how long the next one may take."""
        now = time.monotonic()
        if self._border:
            self._steps.append(now - self._border)
        self._border = now

    def note_save(self, seconds: float) -> None:
        """A save was on the disk after `seconds`; its time is no part of a step's."""
        self._save_s = max(self._save_s, seconds)
        self._border = 0.0

    def skip(self) -> None:
        """What came since the last border was no step, e.g. an evaluation."""
        self._border = 0.0

    def read(self, step: int) -> Request:
        self._stopping = self._stopping or self._is_too_late() or self._stop_file_says(step)
        return Request.stop if self._stopping else self._asked.request

    def _is_too_late(self) -> bool:
        """Whether another step and the save after it might not end before the deadline."""
        if self._deadline is None:
            return False
        need = SLACK * (max(self._steps, default=0.0) + (self._save_s or SAVE_GUESS_S)) + END_S
        return time.time() + need > self._deadline

    def _stop_file_says(self, step: int) -> bool:
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return False
        self._looked = now
        return stops_after(self._file, step)

    def obeyed(self) -> None:
        """The run has stopped: the same file must not stop the next attempt."""
        with suppress(OSError):
            self._file.unlink()


def stops_after(path: Path, step: int) -> bool:
    """Whether a stop file asks for the end after this step: empty = at once, a number = after that step."""
    try:
        text = path.read_text().strip()
    except OSError:
        return False
    return step >= int(text) if text.isdecimal() else True
