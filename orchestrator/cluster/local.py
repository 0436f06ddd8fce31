"""Jobs on this machine: ranks forked from a server that has the imports, watched by torch's own elastic agent."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from orchestrator.bundle import Bundle
from orchestrator.config import ComputeConfig
from orchestrator.errors import (
    EXIT_INTERRUPTED,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    EXIT_TERMINATED,
    EXIT_USER,
    ConfigError,
)

PRELOADED = ["orchestrator.train.fit", "orchestrator.train.evaluation_job", "jobs.train", "jobs.evaluate"]
FINAL = {0, EXIT_USER, EXIT_NO_PROGRESS, EXIT_STOPPED, EXIT_INTERRUPTED, EXIT_TERMINATED}
"""Exit codes after which this machine does not start the run again by itself."""
MONITOR_S = 0.05
AGENT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a group of ranks ended: the exit code, and the first true cause where it failed."""

    exit_code: int
    rank: int | None = None
    error: str | None = None
    traceback: str | None = None


def warm_up() -> None:
    """Start the server that ranks are forked from; it imports while the launcher composes the config."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks inherit the server's environment, not the launcher's
    multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def num_processes(config: ComputeConfig) -> int:
    """World size on this machine."""
    if config.num_processes != "auto":
        return int(config.num_processes)
    if config.device.name == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def run_attempts(bundle: Bundle, entry: Callable[..., None], arguments: tuple[Any, ...]) -> Ended:
    """Start the ranks, again after failures that a retry can mend, until the job ends."""
    ended = Ended(1)
    for _ in range(bundle.config.cluster.max_restarts + 1):
        attempt = next_attempt(bundle.folder)
        ended = run_attempt(bundle, entry, (*arguments, attempt, time.time()), attempt)
        if ended.exit_code in FINAL:
            break
        logging.getLogger(__name__).warning("attempt %d ended with code %d", attempt, ended.exit_code)
    return ended


def next_attempt(folder: Path) -> int:
    """Number of the coming attempt, counted by the log folders of the earlier ones."""
    numbers = [int(path.name.removeprefix("attempt_")) for path in folder.glob("logs/attempt_*")]
    return max(numbers, default=0) + 1


def run_attempt(bundle: Bundle, entry: Callable[..., None], arguments: tuple[Any, ...], attempt: int) -> Ended:
    """One group of ranks from start to end; each calls ``entry(*arguments)`` with torchrun's environment."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    _silence_agent()
    os.environ["OMP_NUM_THREADS"] = str(bundle.config.compute.threads_per_process)
    try:
        with _own_signal_handlers():
            elastic_launch(_launch_config(bundle), entry)(*arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return first_cause(codes, _left_errors(bundle.folder, attempt))
    except SignalException as stopped:
        code = EXIT_INTERRUPTED if stopped.sigval == signal.SIGINT else EXIT_TERMINATED
        return _unless_not_saved(Ended(code), _left_errors(bundle.folder, attempt))
    return Ended(0)


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """The agent leaves its handlers behind, and a later Ctrl-C would end the launcher with the agent's traceback."""
    handlers = {number: signal.getsignal(number) for number in AGENT_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _unless_not_saved(stopped: Ended, errors: list[dict[str, Any]]) -> Ended:
    """A stop whose last save failed for a known reason did not stop after saving."""
    known = [error for error in errors if error["traceback"] is None]
    return first_cause({}, known) if known else stopped


def _silence_agent() -> None:
    """The agent reports each death at length; the launcher tells the first cause instead."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _launch_config(bundle: Bundle) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    config = bundle.config
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes(config.compute),
        run_id=bundle.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{free_port(config.compute)}",
        rdzv_configs={"is_host": True},
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=MONITOR_S,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        shutdown_timeout=round(config.cluster.grace_s),
    )


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


def _left_errors(folder: Path, attempt: int) -> list[dict[str, Any]]:
    errors = []
    for path in (folder / "logs" / f"attempt_{attempt}").glob("rank_*.error.json"):
        with suppress(OSError, ValueError):
            errors.append(json.loads(path.read_text()))
    return errors


def first_cause(codes: dict[int, int], errors: list[dict[str, Any]]) -> Ended:
    """The failure that the others followed from.

    `codes`: exit codes by rank, negative for a signal. A rank that a signal killed says nothing, and its peers' broken
    connections come later; else the earliest error is the cause.
    """
    spoken = {error["rank"] for error in errors}
    for rank, code in sorted(codes.items()):
        if code < 0 and rank not in spoken:
            return Ended(128 - code, rank, f"killed by {_signal_name(-code)}")
    if errors:
        first = min(errors, key=lambda error: error["t"])
        return Ended(first["exit_code"], first["rank"], first["error"], first["traceback"])
    rank, code = min(codes.items())
    return Ended(code, None if code in FINAL else rank, None if code in FINAL else f"ended with code {code}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
