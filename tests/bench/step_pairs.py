"""Our `fit` and a plain DDP loop taking turns: torchrun ... -m tests.bench.step_pairs RUN.json OUT.json.

A shared machine drifts by a fifth within a minute, more than what is measured here, so blocks of steps alternate
within seconds. Ours is timed from the first batch of a block being asked for to that of the next block, which holds
everything that `fit` does in a step; blocks in which an evaluation falls are left out. The first rank
writes the seconds of each pair to a file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from jobs.train import rank
from orchestrator.bundle import load_bundle
from orchestrator.data.stream import Batch, Loader
from orchestrator.train import assembly
from tests.bench.plain_ddp import PlainLoop

BLOCK = 10
"""Steps; tracking.log_every_steps divides it, so that every block logs."""


class TakingTurns:
    """The run's loader; between two blocks of batches it runs as many steps of the plain loop."""

    def __init__(self, loader: Loader, plain: PlainLoop, steps_per_epoch: int):
        self._loader, self._plain, self._steps_per_epoch = loader, plain, steps_per_epoch
        self.pairs: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def wait_s(self) -> float:
        return self._loader.wait_s

    def __iter__(self) -> Iterator[Batch]:
        began = time.perf_counter()
        for step, batch in enumerate(self._loader):
            if step and step % BLOCK == 0:
                dist.barrier()
                ours, now = time.perf_counter() - began, time.perf_counter()
                self._plain.run(BLOCK)
                dist.barrier()
                theirs = time.perf_counter() - now
                if step > BLOCK and (step - BLOCK) // self._steps_per_epoch == step // self._steps_per_epoch:
                    self.pairs.append((ours, theirs))
                began = time.perf_counter()
            yield batch


def main(path: str, out: str) -> None:
    config = load_bundle(Path(path)).config
    made: list[TakingTurns] = []

    def train_loader(plan, split, accumulate, steps, device):
        loader = original(plan, split, accumulate, steps, device)
        made.append(TakingTurns(loader, PlainLoop(config, plan, split, steps), plan.steps_per_epoch))
        return made[0]

    original, assembly.train_loader = assembly.train_loader, train_loader
    rank(path, 1, time.time())
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(made[0].pairs))


if __name__ == "__main__":
    main(*sys.argv[1:])
