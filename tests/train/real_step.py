"""``python real_step.py ROWS [override ...]``: the greatest growth of this process's memory in its second step, bytes.

Freed memory goes back to the system at once (mallopt), so that resident bytes are those in use.
"""

from __future__ import annotations

import ctypes
import json
import sys

import torch

from orchestrator.compose import compose
from orchestrator.config import RunConfig
from orchestrator.train.assembly import build_net
from orchestrator.train.footprint import Step, moving_average

CLASSES = 1000
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def resident(what: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def make(config: RunConfig, rows: int) -> Step:
    net = build_net(config, CLASSES, torch.device("cpu"))
    return Step(net, moving_average(net, config), config, rows)


def main(rows: int, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(M_TRIM_THRESHOLD, 0)
    config = compose(overrides).config
    small = make(config, 2)  # batch normalisation wants two values
    small.run(lambda phase: None)  # what libraries take at their first use is not the step's
    del small
    before = resident("VmRSS")
    step = make(config, rows)
    step.run(lambda phase: None)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    step.run(lambda phase: None)
    print(json.dumps({"peak": resident("VmHWM") - before}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
