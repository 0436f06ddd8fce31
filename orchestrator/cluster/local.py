"""Jobs on this machine: ranks forked from a server that has the imports, started again after what a retry can mend."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from orchestrator.bundle import Bundle
from orchestrator.cluster.attempt import Launch, run_attempt
from orchestrator.cluster.cause import Ended
from orchestrator.cluster.journal import Journal
from orchestrator.cluster.places import Places, num_processes
from orchestrator.cluster.restarts import Attempt, Verdict, count_restarts, decide
from orchestrator.cluster.stops import StopSignals
from orchestrator.config import ComputeConfig
from orchestrator.errors import EXIT_RESIZED, EXIT_STOPPED, ConfigError
from orchestrator.files import remove_halves
from orchestrator.train.orders import Request
from orchestrator.train.requests import stops_after

__all__ = ["Ended", "free_port", "next_attempt", "num_processes", "run_attempts", "warm_up"]

PRELOADED = [
    "orchestrator.cluster.deaf",
    "orchestrator.train.fit",
    "orchestrator.train.evaluation_job",
    "jobs.train",
    "jobs.evaluate",
]
NAP_S = 0.05
logger = logging.getLogger(__name__)


def warm_up(interface: str | None = "lo") -> None:
    """Start the server that ranks are forked from; it imports while the launcher composes the config.

    `interface`: through which the ranks meet; None where that is not known yet.
    """
    if interface is not None:  # ranks inherit the server's environment, not the launcher's
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def run_attempts(
    bundle: Bundle, entry: Callable[..., None], arguments: tuple[Any, ...], began: float | None = None
) -> Ended:
    """Start the ranks, again after failures that a retry can mend, until the job ends.

    Each rank calls ``entry(*arguments, attempt, time)`` with torchrun's environment. `began`: time.time() of the
    command's start.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    port = free_port(bundle.config.compute)
    # One store for all attempts: each has its own prefix in it, so that none reads another's dead addresses.
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    began = time.time() if began is None else began
    stop = StopSignals()
    launch = Launch(bundle, entry, arguments, store.port, Journal(bundle.folder), stop, began)
    with stop.listening():
        return _until_the_end(launch)


def _until_the_end(launch: Launch) -> Ended:
    bundle, attempts = launch.bundle, list[Attempt]()
    places = Places(bundle.config.compute, bundle.folder)
    config, verdict = bundle.config.cluster, None
    while True:
        number = next_attempt(bundle.folder)
        world_size = places.world_size()
        _tell_start(launch, number, world_size, verdict)
        attempt = _attempt(launch, number, world_size, places)
        attempts.append(attempt)
        verdict = decide(attempts, config.max_restarts, config.backoff_s)
        verdict = verdict if verdict.ended else _pause(launch, number, attempts, verdict)
        if verdict.ended:
            launch.journal.write("end", number, exit_code=verdict.ended.exit_code)
            return verdict.ended
        if attempt.ended.lost_device and places.is_elastic and attempt.ended.rank is not None:
            places.lose(attempt.ended.rank)


def _attempt(launch: Launch, number: int, world_size: int, places: Places) -> Attempt:
    first = 0  # the first step that was seen

    def resize(step: int) -> Request:
        nonlocal first
        first = first or step
        return places.ask(world_size, progressed=step > first)

    ended, step = run_attempt(launch, number, world_size, places.env(), resize)
    remove_halves(launch.bundle.folder)
    return Attempt(ended, step)


def _tell_start(launch: Launch, number: int, world_size: int, verdict: Verdict | None) -> None:
    if verdict is None:
        argv0 = Path(sys.argv[0]).name
        launch.journal.write("launch", number, argv0=argv0, world_size=world_size, began=round(launch.began, 3))
    else:
        launch.journal.write("restart", number, pause_s=verdict.pause_s, world_size=world_size)


def _pause(launch: Launch, number: int, attempts: list[Attempt], verdict: Verdict) -> Verdict:
    """Tell why the run starts again, wait as long as it should, and end where it is asked to stop meanwhile."""
    last, config = attempts[-1].ended, launch.bundle.config.cluster
    if last.exit_code == EXIT_RESIZED:
        logger.warning("attempt %d ended at step %d to go on with other processes", number, attempts[-1].step)
    else:
        when = f"in {verdict.pause_s:g} s" if verdict.pause_s else "at once"
        where = f"rank {last.rank}: " if last.rank is not None else ""
        what, count = last.error or f"code {last.exit_code}", count_restarts(attempts)
        logger.warning(
            "attempt %d: %s%s; starts again %s (%d of %d)", number, where, what, when, count, config.max_restarts
        )
    until = time.monotonic() + verdict.pause_s
    while True:
        code = _asked_to_stop(launch, attempts[-1].step)
        if code is not None:
            return Verdict(Ended(code))
        if time.monotonic() >= until:
            return verdict
        time.sleep(min(NAP_S, max(0.0, until - time.monotonic())))


def _asked_to_stop(launch: Launch, step: int) -> int | None:
    """The exit code of a request that came while no rank was there to hear it."""
    if launch.stop.exit_code is not None:
        return launch.stop.exit_code
    late = launch.deadline is not None and time.time() >= launch.deadline
    return EXIT_STOPPED if late or stops_after(launch.bundle.folder / "stop", step) else None


def next_attempt(folder: Path) -> int:
    """Number of the coming attempt, counted by the log folders of the earlier ones."""
    numbers = [int(path.name.removeprefix("attempt_")) for path in folder.glob("logs/attempt_*")]
    return max(numbers, default=0) + 1


def free_port(config: ComputeConfig) -> int:
    """The configured port if it is free, or any free one. Raises ConfigError where the configured one is taken."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", config.master_port))
        except OSError as error:
            rule = f"cannot be used on this machine ({error.strerror})"
            raise ConfigError(
                "compute.master_port", config.master_port, rule, "another port, or 0 for a free one"
            ) from None
        return probe.getsockname()[1]
