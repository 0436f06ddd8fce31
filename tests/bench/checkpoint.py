"""How long a step is blocked by a save, beside training and at once, on a fast and on a slow target."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.compose import compose
from orchestrator.train.fence import Fence
from orchestrator.train.heartbeat import Heartbeat
from orchestrator.train.process import Rank
from orchestrator.train.saver import Saver
from orchestrator.train.state import TrainState
from orchestrator.train.writing import Sums
from orchestrator.world import ALONE

RANK = Rank(ALONE, torch.device("cpu"), 1, io.StringIO(), None, Heartbeat())
SIZES = {"1 MB": 1 << 20, "200 MB": 200 << 20}
THROTTLED_BYTES_PER_S = 40e6
STEP_S = 0.05


def bench() -> dict[str, Any]:
    """Medians; `throttled` writes 40 MB/s, by sleeping in the writer after each piece."""
    found: dict[str, Any] = {}
    for size, nbytes in SIZES.items():
        for target in ("fast", "throttled"):
            saves = 3 if nbytes > 1e8 and target == "throttled" else 7
            row = {how: measure(nbytes, target == "throttled", how == "beside", saves) for how in ("at_once", "beside")}
            stall = row["beside"]["stall_s"] / row["at_once"]["stall_s"]
            found[f"{size}, {target}"] = {**row, "stall_ratio": round(stall, 4)}
    return found


def measure(nbytes: int, throttled: bool, asynchronous: bool, saves: int) -> dict[str, float]:
    """Seconds that a save blocks, and how much longer the steps beside it take."""
    state = make_state(nbytes)
    settings = replace(compose([]).config.checkpointing, asynchronous=asynchronous, keep_last=1)
    stalls, beside, write = [], [], Sums.write
    Sums.write = slow_write if throttled else write
    try:
        with tempfile.TemporaryDirectory() as folder:
            saver = Saver(settings, RANK, Fence(Path(folder), 1))
            for step in range(1, saves + 2):
                alone = statistics.median(one_step() for _ in range(5))
                began = time.perf_counter()
                saver.save(state, {"step": step, "metrics": {}, "world_size": 1}, lambda saved: None)
                stalls.append(time.perf_counter() - began)
                beside.append(steps_beside(saver, alone))
            saver.close()
    finally:
        Sums.write = write
    found = {"stall_s": round(statistics.median(stalls[1:]), 5)}  # the first one takes the memory
    return {**found, "step_beside": round(statistics.median(beside[1:]), 3)} if asynchronous else found


def make_state(nbytes: int) -> TrainState:
    """Half of the bytes model, half momentum, in tensors of a ResNet's size."""
    count = max(1, nbytes // (8 << 20))
    weights = {f"w{number}": torch.randn(nbytes // 8 // count) for number in range(count)}
    momentum = {number: {"momentum_buffer": torch.randn_like(weight)} for number, weight in enumerate(weights.values())}
    return TrainState(weights, None, {"state": momentum, "param_groups": []}, {})


def slow_write(self: Sums, content: Any) -> int:
    view = memoryview(content).cast("B")
    for start in range(0, len(view), 1 << 20):
        piece = view[start : start + (1 << 20)]
        _write(self, piece)
        time.sleep(len(piece) / THROTTLED_BYTES_PER_S)
    return len(view)


_write = Sums.write


def one_step() -> float:
    """Something like a step: one thread of the CPU is busy."""
    began, weights = time.perf_counter(), torch.randn(256, 256)
    while time.perf_counter() - began < STEP_S / 2:
        weights = torch.tanh(weights @ weights)
    for _ in range(30):
        weights = torch.tanh(weights @ weights)
    return time.perf_counter() - began - STEP_S / 2


def steps_beside(saver: Saver, alone: float) -> float:
    """Median step while a save is written, against one alone; the save is over at the return."""
    seconds: list[float] = []
    while saver.is_writing:
        seconds.append(one_step())
    saver.wait(0)
    return statistics.median(seconds) / alone if seconds else 1.0
