"""One attempt from start to end: ranks are followed, asked to stop, found hung, killed."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from orchestrator.cluster.group import Group, Place, Start
from orchestrator.cluster.journal import Journal
from orchestrator.cluster.stacks import Stack, dump_stacks, innermost
from orchestrator.cluster.stops import StopSignals
from orchestrator.cluster.watch import Late, find_late, read_signs, steps_done
from orchestrator.errors import EXIT_INTERRUPTED
from orchestrator.train.heartbeat import Sign
from orchestrator.train.orders import Orders, Request, orders_file

logger = logging.getLogger(__name__)
POLL_S = 0.05
WATCH_S = 0.25
"""Between two looks at heartbeats and places."""
REPEAT_S = 0.5
"""Between two sendings of a request to stop: one that came before a rank listened is lost."""


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
    """The part of an attempt that runs on this machine, and what is heard of the others."""

    launch: Launch
    number: int
    place: Place
    group: Group
    starved: int
    """Processes that the kernel had killed for memory before."""
    adapt: Callable[[int], None] = lambda step: None
    """Told now and then how many steps have been computed."""
    stacks_elsewhere: Callable[[], Mapping[int, Stack]] = dict
    """The stacks of ranks on other machines."""
    signs_elsewhere: dict[int, Sign] = field(default_factory=dict)
    """Of the ranks on other machines, their times by this one's clock."""
    ended_elsewhere: set[int] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)
    forwarded: float = 0.0
    watched: float = 0.0

    @property
    def folder(self):
        return self.launch.bundle.folder

    def signs(self) -> dict[int, Sign]:
        return {**self.own_signs(), **self.signs_elsewhere}

    def own_signs(self) -> dict[int, Sign]:
        return read_signs(self.folder, self.number, self.place.ranks, self.began)

    def own_errors(self) -> list[dict[str, Any]]:
        """What failing ranks of this machine wrote down."""
        return [error for error in left_errors(self.folder, self.number) if error["rank"] in self.place.ranks]

    def own_stacks(self) -> dict[int, Stack]:
        return dump_stacks(self.folder, self.number, self.group.pids)

    def has_starved(self) -> bool:
        """Whether the kernel has killed a process of this machine for its memory meanwhile."""
        return out_of_memory_kills() > self.starved


def start_ranks(launch: Launch, number: int, place: Place, env: dict[str, str]) -> Running:
    """Start the ranks of this machine; the caller ends the group."""
    starved = out_of_memory_kills()
    threads = {"OMP_NUM_THREADS": str(launch.bundle.config.compute.threads_per_process)}
    arguments = (*launch.arguments, number, time.time())
    group = Group(Start(launch.entry, arguments, place, launch.starts, {**threads, **env}))
    launch.starts += 1
    return Running(launch, number, place, group, starved)


def run_attempt(launch: Launch, number: int, world_size: int, env: dict[str, str], resize: Callable[[int], Request]):
    """One group of ranks from start to end; returns how it ended and the last step that it computed.

    `resize`: what the places of this machine ask of an attempt that has computed so many steps.
    """
    orders = Orders(orders_file(launch.bundle.folder, number), launch.deadline)
    running = start_ranks(launch, number, Place(world_size, launch.port), env)
    running.adapt = lambda step: orders.ask(resize(step))
    try:
        ended = _follow(running)
    finally:
        running.group.end()
    return ended, steps_done(running.signs())


def _follow(running: Running) -> Ended:
    while True:
        codes = running.group.poll(POLL_S)
        failed = {rank: code for rank, code in codes.items() if is_failure(code)}
        if failed:
            return _failure(running, failed)
        if len(codes) == running.place.world_size:
            return _unless_not_saved(running, orderly_end(codes.values()))
        ended = obey_signal(running) or look(running)
        if ended:
            return ended


def _failure(running: Running, failed: Mapping[int, int]) -> Ended:
    running.group.send(signal.SIGKILL)
    ended = first_cause(dict(failed), running.own_errors(), running.has_starved())
    if ended.error:
        tell_fault(running, ended, "signal" if ended.signal else "exit")
    return ended


def _unless_not_saved(running: Running, ended: Ended) -> Ended:
    """A stop whose last save failed for a known reason did not stop after saving."""
    known = [error for error in running.own_errors() if error["traceback"] is None]
    return first_cause({}, known) if known else ended


def obey_signal(running: Running) -> Ended | None:
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
    stacks = running.own_stacks()
    logger.warning(
        "cluster.grace_s = %g: ranks %s had not saved by then and were killed; the last checkpoint stays",
        grace_s,
        ", ".join(map(str, ranks)),
    )
    for rank, stack in stacks.items():
        logger.warning("rank %d was at %s", rank, (innermost(stack.frames) or ["an unknown place"])[0])
    return Ended(stop.exit_code)


def look(running: Running) -> Ended | None:
    """Hangs and changes of the places, now and then."""
    now = time.monotonic()
    if now - running.watched < WATCH_S:
        return None
    running.watched = now
    signs = running.signs()
    living = (running.group.pids.keys() | running.signs_elsewhere.keys()) - running.ended_elsewhere
    late = [found for found in find_late(signs, running.launch.bundle.config.cluster) if found.rank in living]
    if late:
        return _hung(running, late)
    running.adapt(steps_done(signs))
    return None


def _hung(running: Running, late: list[Late]) -> Ended:
    stacks = {**running.own_stacks(), **running.stacks_elsewhere()}
    running.group.send(signal.SIGKILL)
    culprit = choose_culprit(late, stacks)
    stack = stacks.get(culprit.rank, Stack(False, ()))
    budget = getattr(running.launch.bundle.config.cluster, culprit.key)
    error = (
        f"hung: no sign of life for {culprit.silent_s:.1f} s in phase {culprit.phase} after step {culprit.step} "
        f"(cluster.{culprit.key} = {budget:g})" + (", stopped by a signal (SIGSTOP)" if stack.stopped else "")
    )
    ended = Ended(1, culprit.rank, error, told_stacks(stacks, culprit.rank), by_itself=True, hung=True)
    tell_fault(running, ended, "heartbeat", culprit.phase, culprit.step)
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


def tell_fault(running: Running, ended: Ended, by: str, phase: str | None = None, step: int | None = None) -> None:
    """Write the cause into the journal. `by`: what showed it."""
    sign = running.signs().get(ended.rank or 0)
    running.launch.journal.write(
        "fault",
        running.number,
        rank=ended.rank,
        exit_code=ended.exit_code,
        signal=ended.signal,
        error=ended.error,
        by_itself=ended.by_itself,
        phase=phase or (sign.phase if sign else None),
        step=sign.step if step is None and sign else step,
        detected_by=by,
        silent_s=round(time.monotonic() - sign.t, 3) if sign and by == "heartbeat" else 0.0,
    )
