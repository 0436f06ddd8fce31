"""``torchrun -m tests.bench.border FOLDER``: microseconds that a step pays for stop flag, heartbeat and an event."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from orchestrator.train.heartbeat import Heartbeat
from orchestrator.train.ledger import Ledger
from orchestrator.train.process import join_group
from orchestrator.train.requests import Requests
from orchestrator.train.signals import StopFlag
from orchestrator.world import read_world

TIMES = 2000


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world, flag = read_world(), StopFlag()
    flag.join(join_group(world, torch.device("cpu")))
    requests = Requests(folder, 1, time.time() + 3600)
    flag.ask(requests.read)
    heartbeat, ledger = Heartbeat(folder / f"{world.rank}.heartbeat"), Ledger(folder, world.rank, 1)
    facts = {"phases": {"compute": 0.1, "data_wait": 0.0}, "train/loss": 1.0, "lr": 0.1}
    figures = {
        "agree_us": median_us(lambda step: flag.agree(step)),
        "heartbeat_us": 3 * median_us(lambda step: heartbeat.enter("step", step)),
        "requests_us": median_us(lambda step: requests.note_border()),
        "event_us": median_us(lambda step: ledger.write("step", step=step, **facts)),
    }
    ledger.close()
    if world.is_first:
        print(json.dumps(figures))


def median_us(action: Callable[[int], object]) -> float:
    seconds = []
    for step in range(TIMES):
        began = time.perf_counter()
        action(step)
        seconds.append(time.perf_counter() - began)
    return round(sorted(seconds)[TIMES // 2] * 1e6, 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
