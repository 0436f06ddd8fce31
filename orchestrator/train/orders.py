"""What the launcher asks of a running attempt: a few mapped bytes that the first rank reads at each step's border."""

from __future__ import annotations

import mmap
import struct
from enum import IntEnum
from pathlib import Path

from orchestrator.files import disk_errors

LAYOUT = struct.Struct("<dI")
"""time.time() at which the run must have ended (0: never), the request."""


class Request(IntEnum):
    """Why a run should stop, by urgency: where several meet, the greatest is obeyed."""

    none = 0
    resize_at_save = 1
    """Save as planned, then go on with another number of processes."""
    resize = 2
    """The same at the next border."""
    stop = 3
    """Deadline, stop file, cancel."""
    interrupt = 4
    terminate = 5


class Orders:
    """Written by the launcher, read by ranks; one file an attempt."""

    def __init__(self, path: Path, deadline: float | None = None):
        """Create the file. `deadline`: time.time() at which the run must have ended."""
        self._deadline = deadline or 0.0
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(LAYOUT.pack(self._deadline, Request.none))
            with open(path, "r+b") as file:
                self._memory = mmap.mmap(file.fileno(), LAYOUT.size)

    def ask(self, request: Request) -> None:
        LAYOUT.pack_into(self._memory, 0, self._deadline, request)


class Asked:
    """The reader's side; without a file nothing is ever asked."""

    def __init__(self, path: Path):
        self._memory = None
        if path.exists() and path.stat().st_size >= LAYOUT.size:
            with open(path, "rb") as file:
                self._memory = mmap.mmap(file.fileno(), LAYOUT.size, access=mmap.ACCESS_READ)

    @property
    def deadline(self) -> float | None:
        return (LAYOUT.unpack_from(self._memory)[0] or None) if self._memory else None

    @property
    def request(self) -> Request:
        return Request(LAYOUT.unpack_from(self._memory)[1]) if self._memory else Request.none


def orders_file(folder: Path, attempt: int) -> Path:
    return folder / "logs" / f"attempt_{attempt}" / "orders"
