"""A rank's signs of life: phase, step and time in a few bytes of a mapped file that the launcher reads."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from orchestrator.files import disk_errors

PHASES = ("start", "step", "validation", "save", "end")
LAYOUT = struct.Struct("<IIqdQ")
"""Process id, phase, step, time.monotonic() (one clock for all processes of a machine), beats so far."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sign:
    """The newest sign of life of a rank."""

    pid: int
    phase: str
    step: int
    t: float
    """time.monotonic() of it."""
    beats: int


class Heartbeat:
    """Written by the main thread alone, so that a rank whose main thread is stuck falls silent.

    A beat costs a microsecond: no system call besides the clock, nothing is synced. Without a path nobody reads it.
    """

    def __init__(self, path: Path | None = None):
        self._memory = mmap.mmap(-1, LAYOUT.size) if path is None else _map_file(path)
        self._pid, self._beats = os.getpid(), 0
        self.phase, self.step = "start", 0
        self._write()

    def enter(self, phase: str, step: int) -> None:
        """Begin another phase, at this step."""
        self.phase, self.step = phase, step
        self._write()

    def beat(self, step: int) -> None:
        """Something went forward within the phase."""
        self.step = step
        self._write()

    def following(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, with a beat before each is worked on."""
        for item in items:
            self._write()
            yield item

    def _write(self) -> None:
        self._beats += 1
        phase = PHASES.index(self.phase)
        LAYOUT.pack_into(self._memory, 0, self._pid, phase, self.step, time.monotonic(), self._beats)


def heartbeat_file(folder: Path, attempt: int, rank: int) -> Path:
    return folder / "logs" / f"attempt_{attempt}" / f"rank_{rank}.heartbeat"


def read_sign(path: Path) -> Sign | None:
    """The newest sign of life in a heartbeat file, None where there is none yet."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) < LAYOUT.size:
        return None
    pid, phase, step, t, beats = LAYOUT.unpack_from(content)
    return Sign(pid, PHASES[phase], step, t, beats) if beats else None


def _map_file(path: Path) -> mmap.mmap:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w+b") as file:
            file.write(bytes(LAYOUT.size))  # not truncate: a full disk must refuse here, a mapped hole would be fatal
            file.flush()
            return mmap.mmap(file.fileno(), LAYOUT.size)
