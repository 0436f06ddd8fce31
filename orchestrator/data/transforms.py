"""From a decoded image to the pixels that the network sees; randomness comes in as a keyed generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from orchestrator.config import DataConfig
from orchestrator.options import Crop, Interpolation

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels of the original"""

FILTERS = {Interpolation.bilinear: Image.Resampling.BILINEAR, Interpolation.bicubic: Image.Resampling.BICUBIC}
CROP_TRIES = 10


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What evaluation and prediction do to an image; stored in every checkpoint."""

    image_size: int
    eval_resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def preprocessing_of(config: DataConfig) -> Preprocessing:
    return Preprocessing(
        config.image_size, config.eval_resize, config.interpolation.name, tuple(config.mean), tuple(config.std)
    )


def eval_pixels(image: np.ndarray, spec: Preprocessing) -> np.ndarray:
    """Resize and centre crop: (H, W, 3) uint8 -> (3, S, S) uint8."""
    height, width = image.shape[:2]
    box = _centre_box(width, height, spec) if spec.eval_resize else (0.0, 0.0, float(width), float(height))
    return _resize(image, box, spec.image_size, FILTERS[Interpolation[spec.interpolation]])


def train_pixels(image: np.ndarray, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Random crop and flip: (H, W, 3) uint8 -> (3, S, S) uint8."""
    height, width = image.shape[:2]
    whole = (0.0, 0.0, float(width), float(height))
    box = _random_box(width, height, config, rng) if config.crop is Crop.random_resized else whole
    pixels = _resize(image, box, config.image_size, FILTERS[config.interpolation])
    if config.crop is Crop.pad:
        pixels = _shift(pixels, config.padding, rng)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if rng.random() < config.flip else pixels


def _centre_box(width: int, height: int, spec: Preprocessing) -> Box:
    """The square that a centre crop of `image_size` takes from an image whose short side became `eval_resize`."""
    side = min(width, height) * spec.image_size / spec.eval_resize
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(width: int, height: int, config: DataConfig, rng: np.random.Generator) -> Box:
    """Inception's crop: a share of the area and a ratio drawn until the box fits, else the largest central one."""
    low, high = (math.log(bound) for bound in config.crop_ratio)
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(config.crop_scale[0], config.crop_scale[1])
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    w = min(width, height * config.crop_ratio[1])
    h = min(height, width / config.crop_ratio[0])
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def _resize(image: np.ndarray, box: Box, size: int, resample: Image.Resampling) -> np.ndarray:
    if box == (0, 0, size, size) and image.shape[:2] == (size, size):
        return image.transpose(2, 0, 1).copy()
    resized = Image.fromarray(image).resize((size, size), resample, box=box)
    return np.asarray(resized).transpose(2, 0, 1).copy()


def _shift(pixels: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    """Pad with black on every side and cut the square back out at a random place."""
    size = pixels.shape[1]
    left, top = rng.integers(0, 2 * padding + 1, size=2)
    padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding)))
    return padded[:, top : top + size, left : left + size].copy()
