"""The exponential moving average of a model's weights, on torch's own averaging."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class ExponentialMovingAverage(AveragedModel):
    """A copy of `model` (kept as `.module`) that follows it by ``ema = decay * ema + (1 - decay) * model``.

    The first `update_parameters` copies. Pass the bare model, neither wrapped in DDP nor compiled.
    BatchNorm's running statistics are averaged like the weights that they belong to; counters are copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.requires_grad_(False)
        self.module.eval()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(model)
        # torch truncates the average of a whole number, so that num_batches_tracked would stand still.
        for averaged, current in zip(self.module.buffers(), model.buffers(), strict=True):
            if not averaged.is_floating_point():
                averaged.copy_(current)
