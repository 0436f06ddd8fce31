"""One rank as a process: its log file, its group, its errors as files that the launcher reads."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from orchestrator.config import ComputeConfig
from orchestrator.errors import ConfigError, OrchestratorError, StopRequested
from orchestrator.options import Device, Precision
from orchestrator.redact import redact
from orchestrator.train.heartbeat import Heartbeat
from orchestrator.train.printed import redact_output
from orchestrator.train.signals import die_with_launcher
from orchestrator.train.stacks import stacks_file, stop_telling, tell_stacks
from orchestrator.world import ALONE, World

GROUP_TIMEOUT = timedelta(minutes=30)
AFTER_PEERS_S = 0.3
"""A rank that fails because a signal killed its peer ends after the launcher has seen the true cause."""
SUSPECTS_FIRST_S = 0.5
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True, slots=True)
class Rank:
    """A process of a run: its place, its device, its attempt, and the terminal where the first rank may speak."""

    world: World
    device: torch.device
    attempt: int
    terminal: IO[str]
    control: dist.ProcessGroup | None
    """Group on the CPU for flags and counts, beside the one that gradients use."""
    heartbeat: Heartbeat

    def all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        """The CPU tensors of all ranks, equal in shape; collective."""
        gathered = [torch.empty_like(own) for _ in range(self.world.world_size)]
        dist.all_gather(gathered, own, group=self.control)
        return gathered

    def speak_after(self, suspects: Collection[int]) -> None:
        """Wait a moment where others are at fault: the launcher shall hear what all ranks report from one of them."""
        if self.world.rank not in suspects:
            time.sleep(SUSPECTS_FIRST_S)


class _Redacting(logging.Formatter):
    """What a library logs may hold the address or key that it was given."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def open_logs(folder: Path, world: World, attempt: int) -> IO[str]:
    """Send everything this process prints to its log; return a handle on the terminal as it was.

    Where the launcher prints the logs (LAUNCHER_READS_LOGS), the log stands for the terminal.
    """
    path = folder / "logs" / f"attempt_{attempt}" / f"rank_{world.rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    has_terminal = not os.environ.get("LAUNCHER_READS_LOGS")
    terminal = os.fdopen(os.dup(2 if has_terminal else log), "w", buffering=1)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    redact_output()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    if world.is_first and has_terminal:
        speaker = logging.StreamHandler(terminal)
        speaker.setLevel(logging.WARNING)
        speaker.setFormatter(_Redacting())
        logging.getLogger("orchestrator").addHandler(speaker)
    for chatty in ("pytorch_lightning", "lightning", "torch.distributed", "wandb"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return terminal


def choose_device(config: ComputeConfig, world: World) -> torch.device:
    """The GPU of this rank, or the CPU."""
    kind = require_device(config, world.local_world_size)
    if kind == "cpu":
        return torch.device(kind)
    torch.cuda.set_device(world.local_rank)
    return torch.device(kind, world.local_rank)


def require_device(config: ComputeConfig, processes: int) -> str:
    """The kind of device that `processes` on this machine get, without touching it. Raises ConfigError."""
    count = torch.cuda.device_count() if config.device is not Device.cpu else 0
    if config.device is Device.cuda and count == 0:
        raise ConfigError("compute.device", "cuda", "needs a GPU and this machine has none", "compute.device=auto")
    if count == 0 and config.precision is Precision.fp16:
        raise ConfigError("compute.precision", "fp16", "needs a GPU", "compute.precision=bf16 or fp32")
    if 0 < count < processes:
        rule = f"puts {processes} processes on {count} GPUs, and each needs its own"
        raise ConfigError("compute.num_processes", config.num_processes, rule, f"compute.num_processes={count}")
    return "cuda" if count else "cpu"


def join_group(world: World, device: torch.device) -> dist.ProcessGroup | None:
    """Meet the other ranks; returns the CPU group for flags and counts, None for a process alone."""
    if world.world_size == 1:
        return None
    store, _, _ = next(rendezvous("env://", timeout=GROUP_TIMEOUT))
    # The agent's store outlives an attempt: without a prefix the new ranks would read the dead ranks' addresses.
    store = PrefixStore(f"attempt_{world.attempt}", store)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        device_id=device if on_gpu else None,
    )
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def prepare_arithmetic(config: ComputeConfig, device: torch.device) -> None:
    """Threads and determinism, before anything is computed."""
    if device.type == "cpu":
        torch.set_num_threads(config.threads_per_process)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.backends.cudnn.deterministic = config.deterministic
    if not config.deterministic:
        torch.set_float32_matmul_precision("high")


def supervise(folder: Path, world: World, attempt: int, work: Callable[[IO[str]], None]) -> int:
    """Run a rank's work; returns its exit code and leaves the error, if any, where the launcher looks."""
    if world != ALONE:  # a process alone has no launcher; its parent may be a shell that ends first
        die_with_launcher()
    began = time.time()
    terminal = open_logs(folder, world, attempt)
    stacks = tell_stacks(stacks_file(folder, attempt, world.rank))
    try:
        work(terminal)
    except StopRequested as stop:
        return stop.exit_code
    except OrchestratorError as error:
        _leave_error(folder, world, attempt, error, error.exit_code)
        return error.exit_code
    except BaseException as error:
        print(redact(traceback.format_exc()), file=sys.stderr)
        _leave_error(folder, world, attempt, error, 1)
        if isinstance(error, RuntimeError):  # what a broken collective raises
            time.sleep(AFTER_PEERS_S)
        return 1
    finally:
        logging.getLogger(__name__).info("rank %d ended after %.1f s", world.rank, time.time() - began)
        stop_telling(stacks)
        for child in multiprocessing.active_children():  # a stuck loader process would hold this one up
            child.kill()
        with suppress(Exception):
            terminal.close()
    return 0


def error_file(folder: Path, attempt: int, rank: int) -> Path:
    return folder / "logs" / f"attempt_{attempt}" / f"rank_{rank}.error.json"


def _leave_error(folder: Path, world: World, attempt: int, error: BaseException, exit_code: int) -> None:
    known = isinstance(error, OrchestratorError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    content = {
        "schema": 1,
        "t": time.time(),
        "rank": world.rank,
        "kind": type(error).__name__,
        "exit_code": exit_code,
        "error": redact(text),
        "traceback": None if known else redact(traceback.format_exc()),
    }
    with suppress(OSError):  # a full disk must not hide the exit code
        error_file(folder, attempt, world.rank).write_text(json.dumps(content))
