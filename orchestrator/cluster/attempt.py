"""One attempt from start to end: ranks are followed, asked to stop, found hung, killed."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from orchestrator.bundle import Bundle
from orchestrator.cluster.cause import (
    Ended,
    first_cause,
    is_failure,
    left_errors,
    orderly_end,
    out_of_memory_kills,
)
from orchestrator.cluster.group import Group, Start
from orchestrator.cluster.journal import Journal
from orchestrator.cluster.stacks import Stack, dump_stacks, innermost
from orchestrator.cluster.watch import Late, find_late, read_signs, steps_done
from orchestrator.errors import EXIT_INTERRUPTED, EXIT_TERMINATED
from orchestrator.train.orders import Orders, Request, orders_file

logger = logging.getLogger(__name__)
POLL_S = 0.05
WATCH_S = 0.25
"""Between two looks at heartbeats and places."""
REPEAT_S = 0.5
"""Between two sendings of a request to stop: one that came before a rank listened is lost."""
EXIT_OF_SIGNAL = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_TERMINATED,
    signal.SIGHUP: EXIT_TERMINATED,
    signal.SIGQUIT: EXIT_INTERRUPTED,
}


@dataclass(slots=True)
class StopSignals:
    """Signals that reached the launcher; the most urgent one counts, a second one changes nothing else."""

    received: signal.Signals | None = None
    t: float = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        earlier = {number: signal.signal(number, self._receive) for number in EXIT_OF_SIGNAL}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.t = time.monotonic()
        if self.received is None or EXIT_OF_SIGNAL[signal.Signals(number)] == EXIT_TERMINATED:
            self.received = signal.Signals(number)

    @property
    def exit_code(self) -> int | None:
        return None if self.received is None else EXIT_OF_SIGNAL[self.received]


@dataclass(slots=True)
class Launch:
    """What all attempts of one command share."""

    bundle: Bundle
    entry: Callable[..., None]
    arguments: tuple[Any, ...]
    port: int
    journal: Journal
    stop: StopSignals
    began: float
    """time.time() at which the command began."""
    starts: int = 0

    @property
    def deadline(self) -> float | None:
        limit = self.bundle.config.compute.max_time_s
        return self.began + limit if limit else None


@dataclass(slots=True)
class Running:
    """An attempt under way."""

    launch: Launch
    number: int
    world_size: int
    resize: Callable[[int], Request]
    """What the places of this machine ask of an attempt that has computed so many steps."""
    orders: Orders
    group: Group
    began: float = field(default_factory=time.monotonic)
    forwarded: float = 0.0
    watched: float = 0.0

    @property
    def folder(self):
        return self.launch.bundle.folder

    def signs(self):
        return read_signs(self.folder, self.number, self.world_size, self.began)


def run_attempt(launch: Launch, number: int, world_size: int, env: dict[str, str], resize: Callable[[int], Request]):
    """One group of ranks from start to end; returns how it ended and the last step that it computed."""
    starved = out_of_memory_kills()
    orders = Orders(orders_file(launch.bundle.folder, number), launch.deadline)
    arguments = (*launch.arguments, number, time.time())
    threads = {"OMP_NUM_THREADS": str(launch.bundle.config.compute.threads_per_process)}
    start = Start(launch.entry, arguments, world_size, launch.port, launch.starts, {**threads, **env})
    launch.starts += 1
    running = Running(launch, number, world_size, resize, orders, Group(start))
    try:
        ended = _follow(running, starved)
    finally:
        running.group.end()
    return ended, steps_done(running.signs())


def _follow(running: Running, starved: int) -> Ended:
    while True:
        codes = running.group.poll(POLL_S)
        failed = {rank: code for rank, code in codes.items() if is_failure(code)}
        if failed:
            return _failure(running, failed, starved)
        if len(codes) == running.world_size:
            return _unless_not_saved(running, orderly_end(codes.values()))
        ended = _obey_signal(running) or _look(running)
        if ended:
            return ended


def _failure(running: Running, failed: Mapping[int, int], starved: int) -> Ended:
    running.group.send(signal.SIGKILL)
    errors = left_errors(running.folder, running.number)
    out_of_memory = out_of_memory_kills() > starved
    ended = first_cause(dict(failed), errors, out_of_memory)
    if ended.error:
        _tell_fault(running, ended, "signal" if ended.signal else "exit")
    return ended


def _unless_not_saved(running: Running, ended: Ended) -> Ended:
    """A stop whose last save failed for a known reason did not stop after saving."""
    known = [error for error in left_errors(running.folder, running.number) if error["traceback"] is None]
    return first_cause({}, known) if known else ended


def _obey_signal(running: Running) -> Ended | None:
    """Hand a signal on to the ranks until they have ended, for cluster.grace_s at most."""
    stop, now = running.launch.stop, time.monotonic()
    if stop.exit_code is None:
        return None
    if now - running.forwarded > REPEAT_S:
        running.forwarded = now
        running.group.send(signal.SIGINT if stop.exit_code == EXIT_INTERRUPTED else signal.SIGTERM)
    grace_s = running.launch.bundle.config.cluster.grace_s
    if now - stop.t < grace_s:
        return None
    ranks = sorted(running.group.pids)
    stacks = dump_stacks(running.folder, running.number, running.group.pids)
    logger.warning(
        "cluster.grace_s = %g: ranks %s had not saved by then and were killed; the last checkpoint stays",
        grace_s,
        ", ".join(map(str, ranks)),
    )
    for rank, stack in stacks.items():
        logger.warning("rank %d was at %s", rank, (innermost(stack.frames) or ["an unknown place"])[0])
    return Ended(stop.exit_code)


def _look(running: Running) -> Ended | None:
    """Hangs and changes of the places, now and then."""
    now = time.monotonic()
    if now - running.watched < WATCH_S:
        return None
    running.watched = now
    signs = running.signs()
    living = running.group.pids
    late = [found for found in find_late(signs, running.launch.bundle.config.cluster) if found.rank in living]
    if late:
        return _hung(running, late)
    running.orders.ask(running.resize(steps_done(signs)))
    return None


def _hung(running: Running, late: list[Late]) -> Ended:
    stacks = dump_stacks(running.folder, running.number, running.group.pids)
    running.group.send(signal.SIGKILL)
    culprit = choose_culprit(late, stacks)
    stack = stacks.get(culprit.rank, Stack(False, ()))
    budget = getattr(running.launch.bundle.config.cluster, culprit.key)
    error = (
        f"hung: no sign of life for {culprit.silent_s:.1f} s in phase {culprit.phase} after step {culprit.step} "
        f"(cluster.{culprit.key} = {budget:g})" + (", stopped by a signal (SIGSTOP)" if stack.stopped else "")
    )
    ended = Ended(1, culprit.rank, error, told_stacks(stacks, culprit.rank), by_itself=True, hung=True)
    _tell_fault(running, ended, "heartbeat", culprit.phase, culprit.step)
    return ended


def choose_culprit(late: list[Late], stacks: Mapping[int, Stack]) -> Late:
    """Of ranks that were late together: a stopped one, else one that waits for no other, else the first."""
    none = Stack(False, ())
    return min(late, key=lambda found: _innocence(stacks.get(found.rank, none)))


def _innocence(stack: Stack) -> int:
    return 0 if stack.stopped else 2 if stack.waits else 1


def told_stacks(stacks: Mapping[int, Stack], culprit: int) -> str:
    """The stacks as a person reads them, the culprit's last."""
    lines = []
    for rank, stack in sorted(stacks.items(), key=lambda item: (item[0] == culprit, item[0])):
        state = " (stopped)" if stack.stopped else " (waits for other ranks)" if stack.waits else ""
        lines.append(f"Stack of rank {rank}{state}, innermost call first:")
        lines += [f"  {frame}" for frame in innermost(stack.frames)] or ["  no stack: its interpreter did not answer"]
    return "\n".join(lines) + "\n"


def _tell_fault(running: Running, ended: Ended, by: str, phase: str | None = None, step: int | None = None) -> None:
    sign = running.signs().get(ended.rank or 0)
    running.launch.journal.write(
        "fault",
        running.number,
        rank=ended.rank,
        exit_code=ended.exit_code,
        signal=ended.signal,
        error=ended.error,
        phase=phase or (sign.phase if sign else None),
        step=sign.step if step is None and sign else step,
        detected_by=by,
        silent_s=round(time.monotonic() - sign.t, 3) if sign and by == "heartbeat" else 0.0,
    )
