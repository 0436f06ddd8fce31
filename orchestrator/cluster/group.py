"""The processes of one attempt: forked from the server that has the imports, in the environment that torchrun sets."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

KILLED_S = 10.0
"""How long the end of a killed process is waited for; only one in the kernel's hands takes longer."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which of a run's processes are on this machine, and where all of them meet."""

    local_world_size: int
    port: int
    """Of the store, which a launcher hosts."""
    node: int = 0
    num_nodes: int = 1
    address: str = "127.0.0.1"
    """Of the machine with the store."""

    @property
    def world_size(self) -> int:
        return self.local_world_size * self.num_nodes

    @property
    def ranks(self) -> range:
        first = self.node * self.local_world_size
        return range(first, first + self.local_world_size)


@dataclass(frozen=True, slots=True)
class Start:
    """What each process of a group calls, and where they meet."""

    entry: Callable[..., None]
    arguments: tuple[Any, ...]
    place: Place
    restart: int
    """Groups before this one; it keeps their addresses in the store apart."""
    env: dict[str, str]


class Group:
    """Starts with the object; `end` kills what is left."""

    def __init__(self, start: Start):
        context = multiprocessing.get_context("forkserver")
        self._processes = {
            rank: context.Process(target=_enter, args=(rank_env(start, rank), start.entry, start.arguments))
            for rank in start.place.ranks
        }
        self._ended: dict[int, int] = {}
        for process in self._processes.values():
            process.start()

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the living ranks."""
        return {
            rank: process.pid for rank, process in self._processes.items() if rank not in self._ended and process.pid
        }

    def poll(self, timeout_s: float) -> dict[int, int]:
        """Exit codes by rank, negative for a signal, of all that have ended; returns early when one ends."""
        living = {process.sentinel: rank for rank, process in self._processes.items() if rank not in self._ended}
        if not living:
            time.sleep(timeout_s)
        for sentinel in connection.wait(list(living), timeout_s):
            rank = living[sentinel]  # pyright: ignore[reportArgumentType]
            process = self._processes[rank]
            process.join()
            assert process.exitcode is not None
            self._ended[rank] = process.exitcode
        return dict(self._ended)

    def send(self, number: int, ranks: Iterable[int] | None = None) -> None:
        """Send a signal to these ranks, or to all that live."""
        pids = self.pids
        for rank in pids if ranks is None else ranks:
            with suppress(ProcessLookupError, KeyError):
                os.kill(pids[rank], number)

    def end(self) -> None:
        """Kill what lives, and wait until it is gone."""
        self.send(signal.SIGKILL)
        until = time.monotonic() + KILLED_S
        while self.pids and time.monotonic() < until:
            self.poll(0.01)


def rank_env(start: Start, rank: int) -> dict[str, str]:
    """The variables by which a process knows its place."""
    place = start.place
    return {
        **start.env,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank - place.ranks.start),
        "GROUP_RANK": str(place.node),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
        "TORCHELASTIC_RESTART_COUNT": str(start.restart),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the launcher's: no rank hosts it
    }


def _enter(env: dict[str, str], entry: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(env)
    entry(*arguments)
