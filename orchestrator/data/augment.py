"""Augmentation policies on uint8 images after crop, resize and flip: what is drawn, and Pillow's operations for it.

A policy reads its choices off numbers in [0, 1) that belong to the sample (`orchestrator.keyed.draws`), so an image
looks the same whichever process augments it. Operations and strengths are torchvision's, whose pixels these equal:
RandAugment, https://arxiv.org/abs/1909.13719; TrivialAugment Wide, https://arxiv.org/abs/2103.10158; 3-Augment of
DeiT III, https://arxiv.org/abs/2204.07118; colour jitter as torchvision has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from orchestrator.config import DataConfig
from orchestrator.data.transforms import FILTERS
from orchestrator.keyed import draws
from orchestrator.options import Augment

BINS = 31
"""Strengths of TrivialAugment; RandAugment's 0 to 30 are the same scale."""
SOLARIZE_AT = 128
BLUR_RADIUS = 0.1, 2.0
"""Pixels, of 3-Augment."""
THREE_AUGMENT_JITTER = (0.3, 0.3, 0.3, 0.0)
"""What DeiT III publishes with 3-Augment; data.color_jitter replaces it."""
JITTER_NUMBERS = 8
"""The order of the four changes, then their amounts; the policy's own numbers follow."""
LAYER_NUMBERS = 3
"""Operation, strength and sign."""


class Span(NamedTuple):
    """Greatest values of the operations of a policy at full strength."""

    shear: float
    translate: Callable[[int], float]
    """Pixels of an image that is so wide or high."""
    rotate: float
    enhance: float
    bits: int
    """Posterize: how many of the 8 bits go."""


RAND_AUGMENT = Span(0.3, lambda side: 150 / 331 * side, 30.0, 0.9, 4)
TRIVIAL_AUGMENT = Span(0.99, lambda side: 32.0, 135.0, 0.99, 6)

ENHANCE = {
    "Brightness": ImageEnhance.Brightness,
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Sharpness": ImageEnhance.Sharpness,
}
JITTERED = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", *ENHANCE)
OPERATIONS = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")


def is_augmented(config: DataConfig) -> bool:
    """Whether `augment` does anything."""
    return config.augment is not Augment.none or any(config.color_jitter)


def numbers_needed(config: DataConfig) -> int:
    """How many numbers `augment` reads off for an image."""
    layers = {Augment.none: 0, Augment.randaugment: config.augment_layers}.get(config.augment, 1)
    return JITTER_NUMBERS + LAYER_NUMBERS * layers


def augment_batch(
    images: np.ndarray, config: DataConfig, key: tuple[int | str, ...], ids: np.ndarray, copies: np.ndarray
) -> None:
    """Augment (n, 3, S, S) uint8 in place; `key` is (seed, epoch), to which sample numbers and copies are added."""
    if not is_augmented(config):
        return
    blocks = -(-numbers_needed(config) // 4)
    numbers = draws((*key, "augment"), ids, copies, blocks).reshape(len(ids), -1)
    for image, own in zip(images, numbers, strict=True):
        image[:] = augment(image.transpose(1, 2, 0), config, own).transpose(2, 0, 1)


def augment(image: np.ndarray, config: DataConfig, numbers: np.ndarray) -> np.ndarray:
    """One image, (H, W, 3) uint8 -> the same shape, by at least `numbers_needed` numbers in [0, 1)."""
    own = numbers.tolist()
    shown = _policy(Image.fromarray(np.ascontiguousarray(image)), config, own[JITTER_NUMBERS:])
    jitter = config.color_jitter
    if config.augment is Augment.three_augment and not any(jitter):
        jitter = THREE_AUGMENT_JITTER
    return np.asarray(color_jitter(shown, jitter, own[:JITTER_NUMBERS]))


def _policy(image: Image.Image, config: DataConfig, numbers: list[float]) -> Image.Image:
    match config.augment:
        case Augment.none:
            return image
        case Augment.three_augment:
            return three_augment(image, numbers[0], numbers[1])
        case Augment.trivialaugment:
            strength = int(numbers[1] * BINS)
            return operate(
                image, *_choose(TRIVIAL_AUGMENT, image.size, strength, numbers), FILTERS[config.interpolation]
            )
        case Augment.randaugment:
            for layer in range(config.augment_layers):
                own = numbers[LAYER_NUMBERS * layer :]
                chosen = _choose(RAND_AUGMENT, image.size, config.augment_magnitude, own)
                image = operate(image, *chosen, FILTERS[config.interpolation])
            return image


def _choose(span: Span, size: tuple[int, int], strength: float, numbers: list[float]) -> tuple[str, float]:
    """An operation and its amount, mirrored by the third number where that has a meaning."""
    name = OPERATIONS[int(numbers[0] * len(OPERATIONS))]
    amount = amount_of(name, span, size, strength)
    return name, -amount if name in SIGNED and numbers[2] < 0.5 else amount


def amount_of(name: str, span: Span, size: tuple[int, int], strength: float) -> float:
    """How much an operation does at a strength of 0 to 30: a slope, pixels, degrees, a share, bits kept or a level."""
    share = strength / (BINS - 1)
    match name:
        case "ShearX" | "ShearY":
            return share * span.shear
        case "TranslateX" | "TranslateY":
            return share * span.translate(size[name == "TranslateY"])
        case "Rotate":
            return share * span.rotate
        case "Posterize":
            return 8 - round(share * span.bits)
        case "Solarize":
            return 255 * (1 - share)
        case _:
            return share * span.enhance


def operate(image: Image.Image, name: str, amount: float, resample: Image.Resampling) -> Image.Image:
    """One operation of RandAugment's and TrivialAugment's space; what it uncovers is black."""
    if name in ENHANCE:
        return ENHANCE[name](image).enhance(1 + amount)
    match name:
        case "Posterize":
            return ImageOps.posterize(image, int(amount))
        case "Solarize":
            return ImageOps.solarize(image, math.ceil(amount))  # Pillow inverts what is not below
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Identity":
            return image
    return _move(image, name, amount, resample)


def _move(image: Image.Image, name: str, amount: float, resample: Image.Resampling) -> Image.Image:
    match name:
        case "ShearX":
            return _affine(image, (1, amount, 0, 0, 1, 0), resample)
        case "ShearY":
            return _affine(image, (1, 0, 0, amount, 1, 0), resample)
        case "TranslateX":
            return _affine(image, (1, 0, -int(amount), 0, 1, 0), resample)
        case "TranslateY":
            return _affine(image, (1, 0, 0, 0, 1, -int(amount)), resample)
    assert name == "Rotate", name
    return image.rotate(amount, resample)


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample)


def three_augment(image: Image.Image, choice: float, amount: float) -> Image.Image:
    """Grey, solarized or blurred, a third each; `amount` is the share of the blur's range."""
    match int(choice * 3):
        case 0:
            return image.convert("L").convert("RGB")
        case 1:
            return ImageOps.solarize(image, SOLARIZE_AT)
        case _:
            least, most = BLUR_RADIUS
            return image.filter(ImageFilter.GaussianBlur(least + amount * (most - least)))


def color_jitter(image: Image.Image, most: Sequence[float], numbers: Sequence[float]) -> Image.Image:
    """Brightness, contrast and saturation times 1 ± at most `most`, hue turned by at most ± `most`, in random order."""
    order = sorted(range(4), key=lambda change: numbers[change])
    for change in order:
        if most[change]:
            amount = (2 * numbers[4 + change] - 1) * most[change]
            image = turn_hue(image, amount) if change == 3 else JITTERED[change](image).enhance(1 + amount)
    return image


def turn_hue(image: Image.Image, turns: float) -> Image.Image:
    """Shift every hue by a share of the circle, in steps of 1/255."""
    shift = int(turns * 255)
    hue, *others = image.convert("HSV").split()
    turned = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, *others)).convert("RGB")
