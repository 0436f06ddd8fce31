"""The stop flag: a signal only sets it, and all ranks agree on it at a step's border."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import connection
from types import FrameType

import torch
import torch.distributed as dist

from orchestrator.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

PR_SET_PDEATHSIG = 1
EXIT_OF_SIGNAL = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}


class StopFlag:
    """Remembers the most urgent signal of any rank; `agree` is collective and costs one small all-reduce on the CPU."""

    def __init__(self):
        self._received = 0
        self._group: dist.ProcessGroup | None = None

    def join(self, group: dist.ProcessGroup | None) -> None:
        """Agree within this CPU group from now on."""
        self._group = group

    def listen(self) -> None:
        for number in EXIT_OF_SIGNAL:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = max(self._received, number)

    def agree(self) -> int | None:
        """The exit code that all ranks shall end with, or None to go on."""
        received = self._received
        if self._group is not None:
            flag = torch.tensor([received], dtype=torch.int32)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            received = int(flag.item())
        return EXIT_OF_SIGNAL.get(signal.Signals(received)) if received else None


def die_with_parent() -> None:
    """End this process when the one that started it ends, however that ends.

    Linux watches the parent. Under our launcher that is the fork server, which lives as long as a rank does; a thread
    watches the launcher itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        threading.Thread(target=_follow, args=(launcher.sentinel,), daemon=True, name="die with launcher").start()


def _follow(sentinel: int) -> None:
    connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
