"""A job without a model for tests of the launcher: short steps, saves, and what a script has it suffer."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.bundle import load_bundle
from orchestrator.errors import DeviceError, NodeError, StopRequested, TransientError, UserError
from orchestrator.files import read_json, write_json
from orchestrator.train.heartbeat import Heartbeat, heartbeat_file
from orchestrator.train.process import join_group, supervise
from orchestrator.train.requests import Requests
from orchestrator.train.signals import StopFlag
from orchestrator.world import World, read_world

FOREVER_S = 1000
CPU = torch.device("cpu")


def rank(script: str, attempt: int, began: float) -> None:
    """The entry: `script` is a JSON file in the run's folder."""
    folder, world = Path(script).parent, read_world()
    code = supervise(folder, world, attempt, lambda _: Job(folder, world, attempt, read_json(Path(script))).run())
    sys.exit(code)


def node_rank(bundle: str, attempt: int, began: float) -> None:
    """The entry of the launchers of nodes, which name a bundle: the script lies in its run's folder."""
    rank(str(load_bundle(Path(bundle)).folder / "script.json"), attempt, began)


def doomed(bundle: str, attempt: int, began: float) -> None:
    """The same entry, of a run in which one rank always fails at one step, whatever lies in its folder."""
    folder, world = load_bundle(Path(bundle)).folder, read_world()
    script = {"steps": 10, "blows": [{"do": "raise", "where": "step", "step": 7, "rank": 1}]}
    sys.exit(supervise(folder, world, attempt, lambda _: Job(folder, world, attempt, script).run()))


def mute(script: str, attempt: int, began: float) -> None:
    """An entry that gives no sign of life at all."""
    time.sleep(FOREVER_S)


class Job:
    def __init__(self, folder: Path, world: World, attempt: int, script: dict[str, Any]):
        self.folder, self.world, self.attempt, self.script = folder, world, attempt, script
        self.flag = StopFlag()
        self.flag.listen()
        self.heartbeat = Heartbeat(heartbeat_file(folder, attempt, world.rank))
        self.saved = folder / "saved.json"

    def run(self) -> None:
        self.suffer("start", 0)
        self.flag.join(join_group(self.world, CPU))
        if self.world.is_first:
            self.flag.ask(Requests(self.folder, self.attempt).read)
        first = read_json(self.saved)["step"] if self.saved.exists() else 0
        self.tell("began", first)
        for step in range(first + 1, self.script["steps"] + 1):
            self.step(step)
        self.heartbeat.enter("end", self.script["steps"])

    def step(self, step: int) -> None:
        self.suffer("batch", step)
        self.heartbeat.beat(step - 1)
        self.suffer("step", step)
        time.sleep(self.script.get("step_s", 0.005))
        self.heartbeat.beat(step - 1)
        self.meet()
        self.heartbeat.enter("step", step)
        agreed = self.flag.agree(step, step % self.script.get("save_every", 2) == 0)
        if agreed.save:
            self.save(step)
        if agreed.exit_code is not None:
            raise StopRequested(f"stopped after step {step}", agreed.exit_code)

    def save(self, step: int) -> None:
        self.heartbeat.enter("save", step)
        self.suffer("save", step)
        if self.world.is_first:
            time.sleep(self.script.get("save_s", 0.0))
            write_json(self.saved, {"step": step})
        self.meet()
        self.heartbeat.enter("step", step)

    def meet(self) -> None:
        if self.world.world_size > 1:
            dist.all_reduce(torch.ones(1))

    def suffer(self, where: str, step: int) -> None:
        for blow in self.script.get("blows", []):
            attempts = blow.get("attempts", [self.attempt])
            if (blow["where"], blow.get("step", step), blow.get("rank", 0)) != (where, step, self.world.rank):
                continue
            if self.attempt in attempts:
                self.tell("struck", step)
                BLOWS[blow["do"]]()

    def tell(self, what: str, step: int) -> None:
        line = {
            "what": what,
            "rank": self.world.rank,
            "attempt": self.attempt,
            "step": step,
            "t": time.time(),
            "pid": os.getpid(),
            "world_size": self.world.world_size,
        }
        with open(self.folder / "told.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def _raise(error: BaseException) -> Callable[[], None]:
    def blow() -> None:
        raise error

    return blow


def _kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _hold_interpreter() -> None:
    ctypes.PyDLL(None).sleep(FOREVER_S)


def _meet_alone() -> None:
    dist.all_reduce(torch.ones(1))
    dist.all_reduce(torch.ones(1))
    dist.barrier()


BLOWS: dict[str, Callable[[], None]] = {
    "raise": _raise(ArithmeticError("a made-up fault")),
    "broken peer": _raise(RuntimeError("Connection closed by peer")),
    "user": _raise(UserError("made.up = 1: cannot be. Way out: 2")),
    "node": _raise(NodeError("/made/up: disk full")),
    "device": _raise(DeviceError("device 1 is lost")),
    "network": _raise(TransientError("the store is away")),
    "exit 0": lambda: sys.exit(0),
    "exit 7": lambda: os._exit(7),
    "abort": os.abort,
    "sleep": lambda: time.sleep(FOREVER_S),
    "hold the interpreter": _hold_interpreter,
    "unmatched collective": _meet_alone,
    **{name: _kill(getattr(signal, name)) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGSEGV", "SIGSTOP", "SIGBUS")},
}
