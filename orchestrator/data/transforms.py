"""Which part of an image the network sees: arithmetic on sizes and keyed numbers for a batch at once, and its pixels.

`show` is the exact way, Pillow on a decoded image; `decode.py` comes to the same pixels without decoding all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from orchestrator.config import DataConfig
from orchestrator.options import Crop, Interpolation

FILTERS = {Interpolation.bilinear: Image.Resampling.BILINEAR, Interpolation.bicubic: Image.Resampling.BICUBIC}
CROP_TRIES = 10
BLOCKS = CROP_TRIES + 1
"""Four numbers per try of a crop, and four for flip and shift."""
RAMP_STEP = 32


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What evaluation and prediction do to an image; stored in every checkpoint."""

    image_size: int
    eval_resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Views(NamedTuple):
    """What is shown of each image of a batch."""

    boxes: np.ndarray  # (n, 4) float64: left, top, right, bottom in pixels of the original
    flips: np.ndarray  # (n,) bool: mirrored left and right
    clip: bool
    """Nothing outside the box counts (boxes are whole pixels), or the filter reaches beyond it."""


def preprocessing_of(config: DataConfig) -> Preprocessing:
    return Preprocessing(
        config.eval_size or config.image_size,
        config.eval_resize,
        config.interpolation.name,
        tuple(config.mean),
        tuple(config.std),
    )


def train_size(config: DataConfig, epoch: int) -> int:
    """Side of the square in an epoch: rises evenly over the ramp in multiples of 32 pixels."""
    first, last = config.ramp_epochs
    if not config.ramp_from or epoch >= last:
        return config.image_size
    share = max(0, epoch - first) / (last - first)
    size = config.ramp_from + share * (config.image_size - config.ramp_from)
    return min(config.image_size, max(config.ramp_from, round(size / RAMP_STEP) * RAMP_STEP))


def eval_views(sizes: np.ndarray, spec: Preprocessing) -> Views:
    """The square that a centre crop takes from an image whose short side became `eval_resize`, or the whole image."""
    width, height = sizes.T.astype(np.float64)
    if not spec.eval_resize:
        return Views(_whole(sizes), np.zeros(len(sizes), bool), clip=False)
    side = np.minimum(width, height) * spec.image_size / spec.eval_resize
    left, top = (width - side) / 2, (height - side) / 2
    return Views(np.stack([left, top, left + side, top + side], -1), np.zeros(len(sizes), bool), clip=False)


def train_views(sizes: np.ndarray, numbers: np.ndarray, config: DataConfig) -> Views:
    """Random crop and flip of images of `sizes`, (n, 2) width and height, by numbers (n, BLOCKS, 4) in [0, 1)."""
    random = config.crop is Crop.random_resized
    boxes = random_boxes(sizes, numbers[:, :CROP_TRIES], config) if random else _whole(sizes)
    return Views(boxes, numbers[:, CROP_TRIES, 0] < config.flip, clip=True)


def _whole(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(sizes), sizes], -1).astype(np.float64)


def random_boxes(sizes: np.ndarray, numbers: np.ndarray, config: DataConfig) -> np.ndarray:
    """Inception's crop, (n, 4): a share of the area and a ratio drawn until the box fits, else the largest central one.

    Szegedy et al., Going Deeper with Convolutions (2015), section 6; whole pixels as in torchvision.
    """
    width, height = sizes.astype(np.int64)[:, None, :].transpose(2, 0, 1)  # (n, 1) each
    low, high = (math.log(bound) for bound in config.crop_ratio)
    least, most = config.crop_scale
    area = width * height * (least + numbers[:, :, 0] * (most - least))
    ratio = np.exp(low + numbers[:, :, 1] * (high - low))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    rows, chosen = np.arange(len(sizes)), fits.argmax(1)
    w, h = w[rows, chosen], h[rows, chosen]
    left = np.floor(numbers[rows, chosen, 2] * (width[:, 0] - w + 1))
    top = np.floor(numbers[rows, chosen, 3] * (height[:, 0] - h + 1))
    boxes = np.stack([left, top, left + w, top + h], -1)
    return np.where(fits[rows, chosen][:, None], boxes, _central(width[:, 0], height[:, 0], config))


def _central(width: np.ndarray, height: np.ndarray, config: DataConfig) -> np.ndarray:
    w = np.maximum(1, np.minimum(width, np.rint(height * config.crop_ratio[1])))
    h = np.maximum(1, np.minimum(height, np.rint(width / config.crop_ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return np.stack([left, top, left + w, top + h], -1)


def shift(pixels: np.ndarray, numbers: np.ndarray, padding: int) -> np.ndarray:
    """Pad images with black on every side and cut the square back out at a place drawn: (n, 3, S, S) -> the same."""
    size, out = pixels.shape[-1], np.empty_like(pixels)
    padded = np.pad(pixels, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    places = np.floor(numbers[:, CROP_TRIES, 1:3] * (2 * padding + 1)).astype(int)
    for row, (left, top) in enumerate(places):
        out[row] = padded[row, :, top : top + size, left : left + size]
    return out


def show(image: np.ndarray, views: Views, row: int, size: int, interpolation: Interpolation) -> np.ndarray:
    """The view of one decoded image, (H, W, 3) uint8 -> (3, S, S) uint8, by Pillow."""
    left, top, right, bottom = views.boxes[row].tolist()
    pixels = _resize(image, (left, top, right, bottom), views.clip, size, FILTERS[interpolation])
    return pixels[:, :, ::-1] if views.flips[row] else pixels


def eval_pixels(image: np.ndarray, spec: Preprocessing) -> np.ndarray:
    """Resize and centre crop one decoded image: (H, W, 3) uint8 -> (3, S, S) uint8."""
    sizes = np.array([[image.shape[1], image.shape[0]]])
    return show(image, eval_views(sizes, spec), 0, spec.image_size, Interpolation[spec.interpolation])


def _resize(
    image: np.ndarray, box: tuple[float, float, float, float], clip: bool, size: int, resample: Image.Resampling
) -> np.ndarray:
    if clip:
        left, top, right, bottom = map(int, box)
        image = image[top:bottom, left:right]
        return _resize(image, (0.0, 0.0, float(right - left), float(bottom - top)), False, size, resample)
    if list(box) == [0, 0, size, size] and image.shape[:2] == (size, size):
        return image.transpose(2, 0, 1)
    resized = Image.fromarray(np.ascontiguousarray(image)).resize((size, size), resample, box=box)
    return np.asarray(resized).transpose(2, 0, 1)
