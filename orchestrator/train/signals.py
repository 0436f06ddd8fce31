"""The stop flag: a signal only sets it, and all ranks agree on it at a step's border."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from types import FrameType

import torch
import torch.distributed as dist

from orchestrator.errors import EXIT_INTERRUPTED, EXIT_RESIZED, EXIT_STOPPED, EXIT_TERMINATED
from orchestrator.lineage import die_with_parent
from orchestrator.train.orders import Request

REQUEST_OF_SIGNAL = {signal.SIGINT: Request.interrupt, signal.SIGTERM: Request.terminate}
EXIT_OF_REQUEST = {
    Request.resize_at_save: EXIT_RESIZED,
    Request.resize: EXIT_RESIZED,
    Request.stop: EXIT_STOPPED,
    Request.interrupt: EXIT_INTERRUPTED,
    Request.terminate: EXIT_TERMINATED,
}


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks do at this border."""

    exit_code: int | None
    """To save and end with; None to go on."""
    save: bool
    """Whether a save is due, asked for or not."""


class StopFlag:
    """Remembers the most urgent request; `agree` is collective and costs one small all-reduce on the CPU."""

    def __init__(self):
        self._received = Request.none
        self._group: dist.ProcessGroup | None = None
        self._read: Callable[[int], Request] = lambda step: Request.none
        # kept, since gloo's thread enters Python to free a tensor that nobody holds: see data/forking.py
        self._words = torch.zeros(2, dtype=torch.int32)

    def join(self, group: dist.ProcessGroup | None) -> None:
        """Agree within this CPU group from now on."""
        self._group = group

    def ask(self, read: Callable[[int], Request]) -> None:
        """Take what `read(step)` says into account as well; the first rank does it for all."""
        self._read = read

    def listen(self) -> None:
        for number in REQUEST_OF_SIGNAL:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = max(self._received, REQUEST_OF_SIGNAL[signal.Signals(number)])

    def agree(self, step: int, save_due: bool = False) -> Agreed:
        """What any rank was asked by this step, the same answer on all of them. `save_due`: this rank wants a save."""
        request, due = max(self._received, self._read(step)), int(save_due)
        if self._group is not None:
            self._words[0], self._words[1] = request, due
            dist.all_reduce(self._words, op=dist.ReduceOp.MAX, group=self._group)
            request, due = Request(int(self._words[0])), int(self._words[1])
        if request is Request.resize_at_save and not due:
            request = Request.none
        return Agreed(EXIT_OF_REQUEST.get(request), bool(due or request))


def die_with_launcher() -> None:
    """End this process when its launcher ends.

    Linux watches the parent, which is the fork server. That one ends with the launcher, once the ranks have closed
    the pipe through which it counts its users; a thread watches the launcher itself where that cannot be.
    """
    die_with_parent()
    launcher = multiprocessing.parent_process()
    if launcher is None:
        return
    alive = getattr(forkserver._forkserver, "_forkserver_alive_fd", None)  # pyright: ignore[reportAttributeAccessIssue]
    if alive is not None:
        with suppress(OSError):
            os.close(alive)
        forkserver._forkserver._forkserver_alive_fd = None  # pyright: ignore[reportAttributeAccessIssue]
    threading.Thread(target=_follow, args=(launcher.sentinel,), daemon=True, name="die with launcher").start()


def _follow(sentinel: int) -> None:
    connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
