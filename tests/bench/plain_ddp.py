"""A plain PyTorch DDP loop over the same batches and the same network as a run: torchrun ... plain_ddp.py RUN.json.

The first rank prints images/s over the steps after the warm-up.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from orchestrator.bundle import load_bundle
from orchestrator.data.stream import Split, train_loader
from orchestrator.model.module import Normalise
from orchestrator.model.optim import build_optimizer, peak_lr
from orchestrator.train.fit import build_net
from orchestrator.train.preflight import open_sets, total_steps

WARMUP_STEPS = 10


def main(path: str) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = load_bundle(Path(path)).config
    torch.set_num_threads(config.compute.threads_per_process)
    torch.use_deterministic_algorithms(config.compute.deterministic)
    sets = open_sets(config)
    plan = sets.plan(config)
    split = Split(sets.train, config.data, config.seed, sets.num_classes, rank, world_size)
    steps = total_steps(config, plan.steps_per_epoch)
    net = build_net(config, sets.num_classes, torch.device("cpu"))
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = build_optimizer(config.optimizer, net, peak_lr(config.optimizer, config.recipe.global_batch_size))
    normalise = Normalise(config.data.mean, config.data.std, False)
    images = began = 0
    for step, batch in enumerate(train_loader(plan, split, 1, range(steps), False)):
        if step == WARMUP_STEPS:
            images, began = 0, time.perf_counter()
        loss = F.cross_entropy(model(normalise(batch.images)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        images += batch.step_size
    if rank == 0:
        print(f"images/s {images / (time.perf_counter() - began):.2f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
