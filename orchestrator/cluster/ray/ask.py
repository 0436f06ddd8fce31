"""Questions to a living run through its folder: a file with a number; each worker lets its rank write its stacks."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from orchestrator.cluster.asked import STACK
from orchestrator.cluster.lines import stack_end, stack_lines
from orchestrator.cluster.speaker import Speaker
from orchestrator.cluster.stacks import SETTLED_S, main_thread
from orchestrator.train.stacks import STACKS_SIGNAL

ANSWER_S = 10.0
"""How long all ranks may take; their workers look every half second."""


def ask_file(folder: Path) -> Path:
    return folder / "ask"


class StacksAsked:
    """The worker's side: answers each question once.

    `stacks`: the rank's file, there once it listens; to a rank that does not the signal would be fatal.
    """

    def __init__(self, folder: Path, stacks: Path):
        self._path, self._stacks = ask_file(folder), stacks
        self._answered = self._question()

    def answer(self, pid: int) -> None:
        question = self._question()
        if question == self._answered or not self._stacks.exists():
            return
        self._answered = question
        with suppress(ProcessLookupError):
            os.kill(pid, STACKS_SIGNAL)

    def _question(self) -> str | None:
        with suppress(OSError):
            return self._path.read_text()
        return None


def ask_stacks(folder: Path, attempt: int, timeout_s: float = ANSWER_S) -> dict[int, str]:
    """The asker's side: what the living ranks of an attempt then wrote."""
    paths = {
        int(path.stem.removeprefix("rank_")): path for path in folder.glob(f"logs/attempt_{attempt}/rank_*.stacks")
    }
    sizes = {rank: path.stat().st_size for rank, path in paths.items()}
    ask_file(folder).write_text(str(time.time_ns()))
    until, told = time.monotonic() + timeout_s, dict[int, str]()
    while time.monotonic() < until and len(told) < len(paths):
        time.sleep(SETTLED_S)
        for rank, path in paths.items():
            text = _grown(path, sizes[rank])
            if text and text == told.get(rank, text):
                told[rank] = text
    time.sleep(SETTLED_S)
    return {rank: _grown(path, sizes[rank]) for rank, path in paths.items() if rank in told}


def answer(folder: Path, attempt: int, ask: str) -> str:
    """The lines that answer the request `ask`."""
    told = ask_stacks(folder, attempt)
    stacks = [stack_lines(ask, attempt, rank, main_thread(text)) for rank, text in sorted(told.items())]
    return "".join([*stacks, stack_end(ask, attempt, 0, sorted(told))])


class PodAsked:
    """The driver's side where it runs in a pod: a file that the cluster shows there asks, the driver's log answers."""

    def __init__(self, path: Path, speaker: Speaker):
        self._path, self._speaker = path, speaker
        self._answered: set[str] = set()

    def look(self, folder: Path, attempt: int) -> None:
        """Answer what is new in a thread, since ranks may take seconds."""
        with suppress(OSError, UnicodeDecodeError):
            for ask in STACK.findall(self._path.read_text()):
                if ask not in self._answered:
                    self._answered.add(ask)
                    threading.Thread(target=self._tell, args=(folder, attempt, ask), daemon=True).start()

    def _tell(self, folder: Path, attempt: int, ask: str) -> None:
        self._speaker.put(answer(folder, attempt, ask))


def _grown(path: Path, start: int) -> str:
    with suppress(OSError):
        return path.read_bytes()[start:].decode(errors="replace")
    return ""
