"""Python stacks of ranks that hang: asked for by a signal whose handler needs no lock of the interpreter."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.train.stacks import STACKS_SIGNAL, stacks_file

DUMP_S = 2.0
"""How long ranks may take to write their stacks down."""
SETTLED_S = 0.1
SHOWN_FRAMES = 4
FRAME = re.compile(r'  File "(?P<path>.*)", line (?P<line>\d+) in (?P<name>.*)')
WAITING = re.compile(r"/torch/(distributed/|autograd/graph\.py)")
"""Where a rank is that waits for the others: in a collective, or in a backward pass whose gradients must meet."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A rank's main thread, innermost frame first."""

    stopped: bool
    """Whether a signal had stopped the process."""
    frames: tuple[str, ...]

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks, so that it is a victim."""
        return not self.stopped and any(WAITING.search(frame) for frame in self.frames[:SHOWN_FRAMES])


def dump_stacks(folder: Path, attempt: int, pids: Mapping[int, int]) -> dict[int, Stack]:
    """Let living ranks write their stacks to `rank_N.stacks` and read them; a stopped one is woken up for it.

    The caller kills the ranks afterwards.
    """
    paths = {rank: stacks_file(folder, attempt, rank) for rank in pids}
    sizes = {rank: _size(path) for rank, path in paths.items()}
    stopped = {rank: is_stopped(pid) for rank, pid in pids.items()}
    for rank, pid in pids.items():
        if paths[rank].exists():  # made where the handler is set; without one the signal would be fatal
            _send(pid, STACKS_SIGNAL)
        if stopped[rank]:
            _send(pid, signal.SIGCONT)
    _wait_for_growth(paths, sizes)
    return {rank: Stack(stopped[rank], main_thread(_text_from(paths[rank], sizes[rank]))) for rank in pids}


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped this process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    return False


def main_thread(text: str) -> tuple[str, ...]:
    """Frames of the main thread in faulthandler's words, as ``file:line in function``; it lists that thread last."""
    threads = re.split(r"^(?:Current thread|Thread) .*\n", text, flags=re.MULTILINE)
    found = [FRAME.match(line) for line in threads[-1].splitlines()]
    return tuple(f"{m['path']}:{m['line']} in {m['name']}" for m in found if m)


def innermost(frames: tuple[str, ...]) -> list[str]:
    """The frames to show: the innermost ones, then the innermost of code that is not a library's."""
    shown = list(frames[:SHOWN_FRAMES])
    own = [frame for frame in frames[SHOWN_FRAMES:] if "/site-packages/" not in frame and "/lib/python" not in frame]
    return shown + own[:SHOWN_FRAMES]


def _wait_for_growth(paths: Mapping[int, Path], sizes: Mapping[int, int]) -> None:
    until, last, since = time.monotonic() + DUMP_S, dict(sizes), time.monotonic()
    while time.monotonic() < until:
        time.sleep(0.02)
        now = {rank: _size(path) for rank, path in paths.items()}
        if now != last:
            last, since = now, time.monotonic()
        grown = all(now[rank] > sizes[rank] for rank in paths)
        if grown and time.monotonic() - since > SETTLED_S:
            return


def _size(path: Path) -> int:
    with suppress(OSError):
        return os.stat(path).st_size
    return 0


def _text_from(path: Path, start: int) -> str:
    with suppress(OSError):
        return path.read_bytes()[start:].decode(errors="replace")
    return ""


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
