"""A Ray worker's part: the place of its rank, the rank as a process of its own, and that process to its end.

Ray Train calls the loop in a thread of a process full of other threads. A rank needs signals, forks its loader
processes and must be killed alone, so it gets a process; Ray's own one imports no torch and forms no group.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray.train
import ray.util
from ray.train.backend import Backend, BackendConfig
from ray.train.collective import broadcast_from_rank_zero

from orchestrator.bundle import Bundle, load_bundle
from orchestrator.cluster.cause import ORDERLY, Ended, first_cause, left_errors, out_of_memory_kills
from orchestrator.cluster.journal import Journal
from orchestrator.cluster.local import next_attempt
from orchestrator.cluster.ray.ask import StacksAsked
from orchestrator.cluster.ray.hang import Watch
from orchestrator.cluster.ray.meeting import require_one_folder, require_same_code, wait_until_due
from orchestrator.cluster.route import interface_of
from orchestrator.config import process_range
from orchestrator.errors import EXIT_DONE, EXIT_STOPPED, OrchestratorError
from orchestrator.files import read_json, write_json
from orchestrator.train.orders import Orders, orders_file
from orchestrator.train.stacks import stacks_file
from orchestrator.train.virtual import largest_world
from orchestrator.train.virtual_choice import slices_of

SCHEMA = 1
POLL_S = 0.05
LOOK_S = 0.5
"""Between two looks at notices of preemption, hangs and questions."""
AFTER_PEERS_S = 1.0
"""A rank that failed by itself reports after one that was killed: its error may be that the other is gone."""


class RankEnded(Exception):
    """A rank ended so that the attempt is over; Ray carries it to the controller."""

    def __init__(self, attempt: int | None, ended: Ended):
        super().__init__(f"rank {ended.rank}: {ended.error or f'code {ended.exit_code}'}")
        self.attempt, self.ended = attempt, ended

    def __reduce__(self):
        return type(self), (self.attempt, self.ended)


class OwnGroup(Backend):
    """The ranks form their process group themselves, so Ray has nothing to set up."""

    share_cuda_visible_devices = True  # LOCAL_RANK then counts the GPUs that a node gives to the run


class OwnGroupConfig(BackendConfig):
    @property
    def backend_cls(self):
        return OwnGroup


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is in an attempt, agreed on by all workers."""

    attempt: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    address: str
    port: int
    began: float


@dataclass(slots=True)
class Process:
    """A rank under way."""

    bundle: Bundle
    place: Place
    child: subprocess.Popen[bytes]
    watch: Watch
    stacks: StacksAsked
    starved: int
    looked: float = 0.0
    warned: bool = False
    """Whether it has been told that its node is about to go."""
    hung: Ended | None = field(default=None)


def run_rank(orders: Mapping[str, Any]) -> int | None:
    """Ray Train's loop: start the rank and follow it; returns its exit code where the run ends with it.

    `orders`: `run` (run.json on every node), `command` (what starts a rank), `token` (of the driver's folder).
    """
    context = ray.train.get_context()
    rank = context.get_world_rank()
    try:
        bundle = load_bundle(Path(orders["run"]).absolute())
        require_one_folder(bundle, orders["token"])
        require_same_code(bundle)
    except OrchestratorError as error:
        raise RankEnded(None, Ended(error.exit_code, rank, str(error), by_itself=True)) from None
    place = _meet(bundle, context)
    if place is None:  # more workers than the slices of a step can be shared among: this one waits for better times
        return None
    with _started(bundle, place, orders) as process:
        code = _follow(process)
        return _end(process, code)


def _meet(bundle: Bundle, context: Any) -> Place | None:
    """Agree with the other workers; the first one decides."""
    rank, size = context.get_world_rank(), context.get_world_size()
    plan: Any = broadcast_from_rank_zero(_decide(bundle, size) if rank == 0 else None)
    if rank >= plan["world_size"]:
        return None
    first = rank - context.get_local_rank()
    local_world_size = min(context.get_local_world_size(), plan["world_size"] - first)
    return Place(
        rank=rank,
        local_rank=rank - first,
        local_world_size=local_world_size,
        node=context.get_node_rank(),
        **plan,
    )


def _decide(bundle: Bundle, size: int) -> dict[str, Any]:
    folder, began = bundle.folder, time.time()
    pause_s = wait_until_due(folder)
    number = next_attempt(folder)
    low, high = process_range(bundle.config.compute.num_processes) or (size, size)
    world_size = largest_world(slices_of(bundle.config.compute.virtual_ranks, folder), low, high, size) or size
    limit = bundle.config.compute.max_time_s
    Orders(orders_file(folder, number), began + limit if limit else None)
    if pause_s is None:
        Journal(folder).write("launch", number, argv0="ray", world_size=world_size, began=round(began, 3))
    else:
        Journal(folder).write("restart", number, pause_s=pause_s, world_size=world_size)
    address = ray.util.get_node_ip_address()
    return {"attempt": number, "world_size": world_size, "address": address, "port": _free_port(), "began": began}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextmanager
def _started(bundle: Bundle, place: Place, orders: Mapping[str, Any]) -> Iterator[Process]:
    run, starved = str(Path(orders["run"]).absolute()), out_of_memory_kills()
    command = [*orders["command"], run, str(place.attempt), str(place.began), str(os.getpid())]
    child = subprocess.Popen(command, env=rank_env(bundle, place, os.environ), stdin=subprocess.DEVNULL)
    watch = Watch(bundle, place.attempt, place.world_size)
    asked = StacksAsked(bundle.folder, stacks_file(bundle.folder, place.attempt, place.rank))
    try:
        yield Process(bundle, place, child, watch, asked, starved)
    finally:
        child.kill()
        child.wait()


def rank_env(bundle: Bundle, place: Place, env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables; without Ray's own, among which the cluster's token may be."""
    kept = {name: value for name, value in env.items() if not name.startswith("RAY_")}
    root = str(Path(__file__).parents[3])
    interface = interface_of(ray.util.get_node_ip_address())
    named = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    return {
        **named,
        **kept,
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(bundle.config.compute.threads_per_process),
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "GROUP_RANK": str(place.node),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
        "TORCHELASTIC_RESTART_COUNT": str(place.attempt),
    }


def _follow(process: Process) -> int:
    """The exit code of the rank, negative for a signal."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.child.wait(POLL_S)
        now = time.monotonic()
        if now - process.looked > LOOK_S:
            process.looked = now
            _look(process)


def _look(process: Process) -> None:
    process.stacks.answer(process.child.pid)
    if not process.warned and _is_node_leaving():
        process.warned = True
        process.child.send_signal(signal.SIGTERM)
    if process.hung is None:
        process.hung = process.watch.find_hung(process.place.rank, process.child.pid)
        if process.hung:
            process.child.kill()


def _is_node_leaving() -> bool:
    """Whether Ray has said that a node of the run is about to be taken away.

    Ray's public question waits for all workers to ask it together, which a watcher cannot.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
    except (ImportError, AttributeError):
        return False


def _end(process: Process, code: int) -> int:
    place, folder = process.place, process.bundle.folder
    if code == EXIT_DONE:
        _report(folder, place.rank)
        return code
    if code == EXIT_STOPPED:
        return code
    own = [error for error in left_errors(folder, place.attempt) if error["rank"] == place.rank]
    ended = process.hung or cause_of(place.rank, code, own, out_of_memory_kills() > process.starved)
    if ended.by_itself and ended.traceback and not ended.hung:
        time.sleep(AFTER_PEERS_S)
    raise RankEnded(place.attempt, ended)


def cause_of(rank: int, code: int, own: list[dict[str, Any]], out_of_memory: bool) -> Ended:
    """How a rank ended, by its exit code and the error that it left."""
    return Ended(code, rank) if code in ORDERLY and not own else first_cause({rank: code}, own, out_of_memory)


def _report(folder: Path, rank: int) -> None:
    """Tell Ray where the last checkpoint is: what it copies is a pointer, the run's folder keeps the bytes."""
    result = read_json(folder / "result.json") if rank == 0 else {}
    with TemporaryDirectory() as pointing:
        write_json(Path(pointing) / "pointer.json", {"schema": SCHEMA, "path": result.get("last")})
        checkpoint = ray.train.Checkpoint.from_directory(pointing) if rank == 0 else None
        ray.train.report({"step": result.get("step", 0), "exit_code": EXIT_DONE}, checkpoint=checkpoint)


assert sys.platform == "linux", "a rank follows its worker by what only Linux has"
