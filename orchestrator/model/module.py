"""The LightningModule over a network: uint8 batches in, a loss out whose gradients do not depend on the world size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import Optimizer

from orchestrator.config import RunConfig
from orchestrator.model.finite import FiniteWatch
from orchestrator.model.loss import Targets, row_losses
from orchestrator.model.mixing import Mixing, mixes
from orchestrator.model.optim import build_optimizer, learning_rate_factor, peak_lr
from orchestrator.options import OnNan

TOP_K = 5


@dataclass(frozen=True, slots=True)
class Span:
    """Where a fit stands in its run: the arithmetic that Lightning's trainer must not be asked for."""

    first_step: int
    total_steps: int
    steps_per_epoch: int
    rank: int
    world_size: int
    virtual_ranks: int | None = None
    """Slices of a step over all ranks; None: each rank's share is one slice, and DDP averages."""

    @property
    def slices(self) -> int:
        """Slices of a step that a rank computes one after another."""
        return self.virtual_ranks // self.world_size if self.virtual_ranks else 1

    def place(self, unit: int, accumulate: int) -> Place:
        """What a rank's `unit`-th batch of this fit is."""
        step, within = divmod(unit, self.slices * accumulate)
        number, part = divmod(within, accumulate)
        return Place(self.first_step + step, self.rank * self.slices + number, number, part, part == accumulate - 1)


class Place(NamedTuple):
    """A part of a slice of a step."""

    step: int
    virtual_rank: int
    slice: int
    """Counted within the rank."""
    part: int
    ends_slice: bool


class Normalise(nn.Module):
    """uint8 pixels to the network's floats, on the device of the batch."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: list[float], std: list[float], channels_last: bool):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # (B, 3, S, S) uint8 -> float32
        return images.to(torch.float32).sub_(self.mean).div_(self.std).contiguous(memory_format=self._format)


@torch.no_grad()
def count_hits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows have their label first, and which among the first five: two (B,) bool.

    Of equal logits the lower class comes first, as in argmax; a row with NaN has no hit.
    """
    own, classes = logits.gather(1, labels[:, None]), torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    place, clean = ahead.sum(dim=1), ~logits.isnan().any(dim=1)
    return (place == 0) & clean, (place < TOP_K) & clean


class Classifier(pl.LightningModule):
    """Training of an image classifier. Gradients are weighted by count, so slices of a step may differ in size."""

    def __init__(self, net: nn.Module, config: RunConfig, span: Span):
        super().__init__()
        self.net = net
        self.normalise = Normalise(config.data.mean, config.data.std, config.compute.channels_last)
        self.mixing = Mixing(config) if mixes(config.recipe) else None
        self.config, self.span = config, span
        self.step = span.first_step
        self.peak_lr = peak_lr(config.optimizer, config.recipe.global_batch_size)
        self.watch = FiniteWatch(skips=config.recipe.on_nan is OnNan.skip)
        self._tally = torch.zeros(5, dtype=torch.float64)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Keep the sample numbers readable on the host: asking the device for them would wait for it."""
        self._host_ids, self._host_draws = batch.ids, batch.ids if batch.draws is None else batch.draws
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.watch.begin(self.net, self._tally)
        images, targets = self._prepare(batch, batch_idx)
        logits = self.net(images)
        losses = row_losses(logits, targets, self.config.recipe)
        weights = (batch.ids >= 0).to(losses.dtype)
        loss = (losses * weights).sum()
        self._count(loss, logits, weights, targets.dominant, batch.skipped)
        finite = self.watch.note(loss, batch.ids if batch.ids.device.type == "cpu" else self._host_ids)
        return loss * (self._divided_by / batch.step_size) * finite

    @property
    def units(self) -> int:
        """Batches of a step on this rank."""
        return self.span.slices * self.config.recipe.accumulate

    @property
    def _divided_by(self) -> int:
        """Lightning divides by the units and plain DDP by the ranks, but the step's mean is wanted."""
        return self.units if self.span.virtual_ranks else self.units * self.span.world_size

    def place(self, batch_idx: int) -> Place:
        return self.span.place(batch_idx, self.config.recipe.accumulate)

    def _prepare(self, batch: Any, batch_idx: int) -> tuple[torch.Tensor, Targets]:
        if self.mixing is None:
            return self.normalise(batch.images), Targets(batch.labels)
        drawn = batch.ids if batch.draws is None else batch.draws
        drawn = drawn if drawn.device.type == "cpu" else self._host_draws
        at = self.place(batch_idx)
        return self.mixing(batch.images, batch.labels, drawn, at.step, at.part)

    @torch.no_grad()
    def _count(
        self, loss: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor, skipped: int
    ) -> None:
        first, among = count_hits(logits, labels)
        left_out = torch.full_like(loss, skipped)
        sums = torch.stack([loss, (first * weights).sum(), (among * weights).sum(), weights.sum(), left_out])
        self._tally = self._tally.to(sums.device) + sums.detach()

    @property
    def tally(self) -> torch.Tensor:
        """What `take_tally` would give."""
        return self._tally

    def add_tally(self, sums: list[float]) -> None:
        """Go on from sums that an earlier attempt did not log."""
        self._tally = self._tally + torch.tensor(sums, dtype=torch.float64)

    def take_tally(self) -> torch.Tensor:
        """Sums since the last call on this rank: (5,) float64 of loss, top-1 and top-5 hits, samples, skipped."""
        tally, self._tally = self._tally, torch.zeros_like(self._tally)
        return tally

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout and its like draw from (seed, part of the run, slice): no random state needs to be carried along."""
        at = self.place(batch_idx)
        key = f"{self.config.seed}:{at.step * self.config.recipe.accumulate + at.part}:{at.virtual_rank}".encode()
        torch.manual_seed(int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1)

    def configure_optimizers(self) -> Optimizer:
        return build_optimizer(self.config.optimizer, self.net, self.peak_lr)

    @property
    def lr(self) -> float:
        """Learning rate of the coming step."""
        span = self.span
        factor = learning_rate_factor(self.config.recipe, self.step, span.steps_per_epoch, span.total_steps)
        return self.peak_lr * factor

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        loss = optimizer_closure() if optimizer_closure else None  # here, so that the gradients can be judged first
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        before = self.watch.judge(self.net, self.step + 1, scaled)
        if before is None:
            super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        else:
            self._tally = torch.cat([before[:4], self._tally[4:]])  # images that could not be read stay counted
        self.step += 1
