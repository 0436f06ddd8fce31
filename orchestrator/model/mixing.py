"""Erased rectangles, mixup and cutmix on the device of the batch, in one go with the normalisation.

What is drawn are plain numbers of the host, keyed by (seed, step, part of the step): a resumed run mixes as it would
have, and no generator of the device is touched. Every rank draws the same kind, share and box in a part. An image's
partner is the one half a batch further on in the rank's own part, so no rank needs another's images; which images meet
therefore depends on the world size, unlike everything else in a step.

mixup: https://arxiv.org/abs/1710.09412; cutmix: https://arxiv.org/abs/1905.04899; random erasing:
https://arxiv.org/abs/1708.04896; all three with torchvision's geometry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from orchestrator.config import RecipeConfig, RunConfig
from orchestrator.keyed import draws, keyed_rng
from orchestrator.model.loss import Targets
from orchestrator.options import Precision

ERASE_SCALE = 0.02, 0.33
"""Share of the image's area."""
ERASE_RATIO = 0.3, 3.3
"""Height / width."""
ERASE_TRIES = 10
ERASE_BLOCKS = 1 + ERASE_TRIES
"""Four numbers for whether, then four per try."""
COMPUTE_DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


class Mix(NamedTuple):
    """How the images of a part of a step are mixed."""

    share: float | torch.Tensor
    """Of a row's own image: cutmix's is what the box, cut at the border, leaves."""
    box: tuple[int, int, int, int] | torch.Tensor | None
    """cutmix: left, top, right, bottom in pixels come from the partner; None: mixup."""


def mixes(recipe: RecipeConfig) -> bool:
    """Whether a training step is more than its normalised images."""
    return bool(recipe.erase or (recipe.mix_probability and (recipe.mixup or recipe.cutmix)))


def draw_mix(recipe: RecipeConfig, rng: np.random.Generator, width: int, height: int) -> Mix | None:
    """What a part of a step does, None for nothing; numpy of another version may draw another share."""
    mixed, kind, x, y = rng.random(4).tolist()
    if mixed >= recipe.mix_probability or not (recipe.mixup or recipe.cutmix):
        return None
    if recipe.cutmix and (kind < 0.5 or not recipe.mixup):
        return cut_box(float(rng.beta(recipe.cutmix, recipe.cutmix)), (x, y), width, height)
    return Mix(float(rng.beta(recipe.mixup, recipe.mixup)), None)


def cut_box(share: float, centre: tuple[float, float], width: int, height: int) -> Mix:
    """Box of the image's shape, 1 - `share` of its area, around `centre` (shares of the sides), cut at the border."""
    x, y = int(centre[0] * width), int(centre[1] * height)
    half = 0.5 * math.sqrt(1 - share)
    half_width, half_height = int(half * width), int(half * height)
    left, top = max(0, x - half_width), max(0, y - half_height)
    right, bottom = min(width, x + half_width), min(height, y + half_height)
    return Mix(1 - (right - left) * (bottom - top) / (width * height), (left, top, right, bottom))


def erase_rectangles(numbers: np.ndarray, probability: float, width: int, height: int) -> np.ndarray:
    """Left, top, right, bottom for numbers (n, ERASE_BLOCKS, 4): (n, 4) int64, empty where nothing is erased."""
    scale, ratio, x, y = np.moveaxis(numbers[:, 1:], -1, 0)  # (n, tries) each
    area = width * height * (ERASE_SCALE[0] + scale * (ERASE_SCALE[1] - ERASE_SCALE[0]))
    low, high = np.log(ERASE_RATIO)
    ratio = np.exp(low + ratio * (high - low))
    tall, wide = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (tall < height) & (wide < width)
    left, top = np.floor(x * (width - wide + 1)), np.floor(y * (height - tall + 1))
    chosen = np.arange(len(numbers)), fits.argmax(1)
    found = np.stack([left, top, left + wide, top + tall], -1)[chosen]
    erased = (numbers[:, 0, 0] < probability) & fits[chosen]
    return np.where(erased[:, None], found, 0).astype(np.int64)


class Prepare(nn.Module):
    """uint8 images to the network's floats: one multiply-add, one pass for rectangles, one for partners."""

    scale: torch.Tensor
    offset: torch.Tensor

    def __init__(self, mean: list[float], std: list[float], channels_last: bool, dtype: torch.dtype = torch.float32):
        super().__init__()
        deviations = torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * deviations), persistent=False)
        self.register_buffer("offset", -torch.tensor(mean).view(1, 3, 1, 1) / deviations, persistent=False)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._dtype = dtype

    def forward(
        self, images: torch.Tensor, rectangles: torch.Tensor | None, mix: Mix | None, rows: int
    ) -> torch.Tensor:
        """(B, 3, H, W) uint8 -> the same shape; `rectangles` (B, 4) become 0, the first `rows` images are mixed."""
        pixels = images.to(torch.float32, memory_format=self._format)
        torch.addcmul(self.offset, pixels, self.scale, out=pixels)
        height, width = images.shape[2:]
        if rectangles is not None:
            sides = rectangles[:, :, None].unbind(1)  # four of (B, 1)
            pixels.masked_fill_(inside(sides, width, height, images.device)[:, None], 0)
        if mix is not None:
            pixels = blend(pixels, mix, rows)
        return pixels.to(self._dtype)


def inside(
    sides: Sequence[int | torch.Tensor] | torch.Tensor, width: int, height: int, device: torch.device
) -> torch.Tensor:
    """Which pixels lie in rectangles of `sides` left, top, right, bottom: (..., H, W) bool."""
    left, top, right, bottom = sides
    x, y = torch.arange(width, device=device), torch.arange(height, device=device)
    return ((y >= top) & (y < bottom))[..., :, None] & ((x >= left) & (x < right))[..., None, :]


def blend(pixels: torch.Tensor, mix: Mix, rows: int) -> torch.Tensor:
    """Mix each of the first `rows` images with the one half of them further on; the others stay."""
    within = None if mix.box is None else inside(mix.box, pixels.shape[3], pixels.shape[2], pixels.device)
    mixed, apart = torch.empty_like(pixels), rows // 2
    for own, partner in ((slice(rows - apart), slice(apart, rows)), (slice(rows - apart, rows), slice(apart))):
        if within is None:
            torch.lerp(pixels[partner], pixels[own], mix.share, out=mixed[own])
        else:
            torch.where(within, pixels[partner], pixels[own], out=mixed[own])
    mixed[rows:] = pixels[rows:]
    return mixed


class Mixing(nn.Module):
    """What a training step does to a batch by the recipe's mixup, cutmix and erase."""

    def __init__(self, config: RunConfig):
        super().__init__()
        data, compute = config.data, config.compute
        dtype = COMPUTE_DTYPES[compute.precision]
        self.prepare = Prepare(data.mean, data.std, compute.channels_last, dtype)
        self._recipe, self._seed, self._compiled = config.recipe, config.seed, compute.compile
        if compute.compile:
            self.prepare.compile()

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor, step: int, part: int
    ) -> tuple[torch.Tensor, Targets]:
        """`ids` (B,) lie on the host and tell copies of a sample apart.

        Rows that only fill a batch up (negative ids, at its end) are not mixed.
        """
        numbers, (height, width), device = ids.numpy(), images.shape[2:], images.device
        rows = int((numbers >= 0).sum())
        rng = keyed_rng(self._seed, step, part, "mix")
        mix = draw_mix(self._recipe, rng, width, height) if rows > 1 else None
        rectangles = self._rectangles(numbers, step, width, height)
        if rectangles is not None:
            rectangles = rectangles.to(device, non_blocking=True)
        pixels = self.prepare(images, rectangles, self._placed(mix, device), rows)
        return pixels, targets_of(labels, mix, rows)

    def _rectangles(self, ids: np.ndarray, step: int, width: int, height: int) -> torch.Tensor | None:
        if not self._recipe.erase:
            return None
        own = draws((self._seed, step, "erase"), ids, np.zeros_like(ids), ERASE_BLOCKS)
        return torch.from_numpy(erase_rectangles(own, self._recipe.erase, width, height))

    def _placed(self, mix: Mix | None, device: torch.device) -> Mix | None:
        """Compiled code would be compiled again for every new number, but not for a new tensor."""
        if mix is None or not self._compiled:
            return mix
        box = None if mix.box is None else torch.as_tensor(mix.box).to(device, non_blocking=True)
        return Mix(torch.tensor(mix.share, dtype=torch.float32).to(device, non_blocking=True), box)


def targets_of(labels: torch.Tensor, mix: Mix | None, rows: int) -> Targets:
    """Labels (B,) beside those of the partners that `blend` takes."""
    if mix is None:
        return Targets(labels)
    partner = torch.cat([labels[rows // 2 : rows], labels[: rows // 2], labels[rows:]])
    return Targets(labels, partner, float(mix.share))
