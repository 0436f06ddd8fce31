"""A pod of a Ray cluster that is told to go: what the run has in it saves first. Run by the pod's preStop hook.

Kubernetes waits for the hook before it signals the container, whose first process is a shell that hears nothing. So
the hook also ends Ray, which tells its cluster first that nothing more may start on this node.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PROGRAM = ["-m", "jobs.ray_driver"]
RANK, LEAVE = "--rank", "--leave"
"""Arguments of the program: a rank with its facts, and this hook."""
NAP_S = 0.1
SETTLE_S = 5.0
"""In which Ray's own workers may still say how their ranks ended."""


@dataclass(slots=True)
class Here:
    """Process ids in this pod, by what they are."""

    drivers: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    ray: list[int] = field(default_factory=list)
    """`ray start`, which ends all that it has started; on SIGTERM it drains its node first."""
    raylets: list[int] = field(default_factory=list)


def leave(run: str) -> None:
    """Return once nothing of the run is left in this pod and Ray is about to end. `run`: the path of its run.json."""
    here = find(run)
    if here.drivers:
        _signal(here.drivers, signal.SIGHUP)
    else:
        _signal(here.ray, signal.SIGTERM)
        _signal(here.ranks, signal.SIGTERM)
    while (left := find(run)).drivers or left.ranks:
        time.sleep(NAP_S)
    until = time.monotonic() + SETTLE_S
    while not here.drivers and find(run).raylets and time.monotonic() < until:
        time.sleep(NAP_S)
    left = find(run)
    _signal(left.ray + left.raylets, signal.SIGTERM)


def find(run: str) -> Here:
    """What runs in this pod now."""
    here = Here()
    for pid, words in _processes():
        program = words[1:]
        if program == [*PROGRAM, run]:
            here.drivers.append(pid)
        elif program[:4] == [*PROGRAM, RANK, run]:
            here.ranks.append(pid)
        elif program[1:2] == ["start"] and Path(program[0]).name == "ray":
            here.ray.append(pid)
        elif Path(words[0]).name == "raylet":
            here.raylets.append(pid)
    return here


def _processes() -> Iterator[tuple[int, list[str]]]:
    """With the words of their command lines; what has ended and waits to be reaped has none."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")[:-1]
            if words:
                yield int(path.parent.name), words


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
