"""What a batch should come out as, whole or mixed, and the loss of each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from orchestrator.config import RecipeConfig
from orchestrator.options import Loss

PRESENT = 0.2
"""bce: share of an image from which on a class counts as there; Wightman et al., https://arxiv.org/abs/2110.00476."""


class Targets(NamedTuple):
    """Labels of a batch, and of the images that are mixed into it."""

    own: torch.Tensor  # (B,) int64
    partner: torch.Tensor | None = None  # (B,) int64
    share: float = 1.0
    """Of a row's own label; the partner's is the rest."""

    @property
    def dominant(self) -> torch.Tensor:
        """The label with the larger share, (B,) int64: what counts as a hit in training."""
        return self.own if self.partner is None or self.share >= 0.5 else self.partner


def row_losses(logits: torch.Tensor, targets: Targets, recipe: RecipeConfig) -> torch.Tensor:
    """The loss of each row, (B, classes) -> (B,)."""
    if recipe.loss is Loss.bce:
        wanted = presence(targets, logits.shape[1], recipe.label_smoothing)
        return F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none").mean(dim=1)
    own = _cross_entropy(logits, targets.own, recipe)
    if targets.partner is None:
        return own
    # Cross-entropy is linear in its target, smoothed or not: this is the loss of the soft target.
    return targets.share * own + (1 - targets.share) * _cross_entropy(logits, targets.partner, recipe)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, recipe: RecipeConfig) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=recipe.label_smoothing)


def soft_targets(targets: Targets, num_classes: int) -> torch.Tensor:
    """Shares of the classes, (B, classes) float32; every row sums to 1."""
    classes = torch.arange(num_classes, device=targets.own.device)
    own = (targets.own[:, None] == classes).float()
    if targets.partner is None:
        return own
    return torch.lerp((targets.partner[:, None] == classes).float(), own, targets.share)


def presence(targets: Targets, num_classes: int, smoothing: float) -> torch.Tensor:
    """Of each class whether it is there, (B, classes) float32, smoothed towards 1 / classes."""
    there = (soft_targets(targets, num_classes) > PRESENT).float()
    return there * (1 - smoothing) + smoothing / num_classes
