"""A plain PyTorch DDP loop over the same batches and the same network as a run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from orchestrator.config import RunConfig
from orchestrator.data.order import TrainPlan
from orchestrator.data.stream import Batch, Split, train_loader
from orchestrator.model.module import Normalise
from orchestrator.model.optim import build_optimizer, peak_lr
from orchestrator.train.assembly import build_net


class PlainLoop:
    """What a tutorial on DDP writes; the group must stand before the first step."""

    def __init__(self, config: RunConfig, plan: TrainPlan, split: Split, steps: range):
        net = build_net(config, split.num_classes, torch.device("cpu"))
        self._model = DistributedDataParallel(net, gradient_as_bucket_view=True)
        self._optimizer = build_optimizer(
            config.optimizer, net, peak_lr(config.optimizer, config.recipe.global_batch_size)
        )
        self._normalise = Normalise(config.data.mean, config.data.std, False)
        self._batches: Iterator[Batch] = iter(train_loader(plan, split, 1, steps))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self._batches)
            loss = F.cross_entropy(self._model(self._normalise(batch.images)), batch.labels)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
