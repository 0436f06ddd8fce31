"""What a node is asked while it runs: a file that the cluster shows in the pod, `stack-1`, `stack-2` and so on."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from orchestrator.cluster.lines import stack_end, stack_lines
from orchestrator.cluster.speaker import Speaker
from orchestrator.cluster.stacks import Stack, dump_stacks

ASK_S = 1.0
STACK = re.compile(r"stack-\d+")
NO_STACK = ("no stack: its interpreter did not answer",)


class Asked:
    """Answers each request once."""

    def __init__(self, path: Path, speaker: Speaker, node: int):
        self._path, self._speaker, self._node = path, speaker, node
        self._answered: set[str] = set()
        self._looked = 0.0

    def answer(self, folder: Path, attempt: int, pids: Mapping[int, int]) -> None:
        """Look, now and then. `pids`: of the living ranks."""
        now = time.monotonic()
        if now - self._looked < ASK_S:
            return
        self._looked = now
        with suppress(OSError, UnicodeDecodeError):
            for ask in STACK.findall(self._path.read_text()):
                if ask not in self._answered:
                    self._answered.add(ask)
                    self._tell_stacks(ask, attempt, stacks_of_living(folder, attempt, pids))

    def _tell_stacks(self, ask: str, attempt: int, stacks: Mapping[int, Stack]) -> None:
        for rank, stack in sorted(stacks.items()):
            stopped = ("stopped by a signal (SIGSTOP)",) if stack.stopped else ()
            self._speaker.put(stack_lines(ask, attempt, rank, [*stopped, *(stack.frames or NO_STACK)]))
        self._speaker.put(stack_end(ask, attempt, self._node, sorted(stacks)))


def stacks_of_living(folder: Path, attempt: int, pids: Mapping[int, int]) -> dict[int, Stack]:
    """Where these ranks are, which then go on as before: one that was stopped is stopped again."""
    stacks = dump_stacks(folder, attempt, pids) if pids else {}
    for rank, stack in stacks.items():
        if stack.stopped:
            with suppress(ProcessLookupError):
                os.kill(pids[rank], signal.SIGSTOP)
    return stacks
