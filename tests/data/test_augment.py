"""Operations have torchvision's pixels, policies its odds, and a sample's numbers alone decide what it looks like."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as tv
from torchvision.transforms.v2 import functional as F

from orchestrator.compose import compose
from orchestrator.config import DataConfig
from orchestrator.data import augment as ours
from orchestrator.data.augment import OPERATIONS, RAND_AUGMENT, TRIVIAL_AUGMENT, amount_of, augment, operate
from orchestrator.keyed import draws
from orchestrator.options import Augment, Interpolation

SIZES = [(1, 1), (1, 512), (2, 3), (31, 17), (224, 224), (512, 333)]
FILTERS = [(Interpolation.bilinear, InterpolationMode.BILINEAR), (Interpolation.bicubic, InterpolationMode.BICUBIC)]
POLICIES = [Augment.randaugment, Augment.trivialaugment, Augment.three_augment, Augment.none]


@cache
def base() -> DataConfig:
    return compose([]).config.data


def config_of(policy: Augment, **keys: object) -> DataConfig:
    return replace(base(), augment=policy, **keys)  # pyright: ignore[reportArgumentType]


@cache
def picture(width: int, height: int, kind: str = "photo") -> Image.Image:
    """Smooth colours with noise and edges; `grey` has equal channels, `flat` a single colour."""
    if kind == "flat":
        return Image.new("RGB", (width, height), (7, 130, 201))
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[:height, :width]
    waves = [90 * np.sin(x / (5 + c)) + 40 * np.cos(y / (3 + c)) + 120 for c in range(3)]
    pixels = np.stack(waves, -1) + rng.normal(0, 20, (height, width, 3))
    pixels[height // 3 : height // 2, :: max(1, width // 4)] = 255
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.convert("L").convert("RGB") if kind == "grey" else image


def uniform(count: int, length: int, seed: int = 0) -> np.ndarray:
    ids = np.arange(count)
    return draws((seed, 0, "augment"), ids, np.zeros_like(ids), -(-length // 4)).reshape(count, -1)


def torchvisions(image: Image.Image, name: str, amount: float, mode: InterpolationMode) -> np.ndarray:
    transform = tv.RandAugment()
    level = amount / 255 if name == "Solarize" else amount
    return np.asarray(transform._apply_image_or_video_transform(image, name, level, mode, transform._fill))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("interpolation", "mode"), FILTERS, ids=["bilinear", "bicubic"])
def test_each_operation_has_torchvisions_pixels_at_every_strength(
    name: str, interpolation: Interpolation, mode: InterpolationMode
) -> None:
    for size in SIZES:
        for kind in ("photo", "grey", "flat"):
            image = picture(*size, kind)
            for span in (RAND_AUGMENT, TRIVIAL_AUGMENT):
                for strength in (0, 3, 9, 14, 30) if max(size) < 300 else (17,):
                    amount = amount_of(name, span, image.size, strength)
                    for signed in (amount, -amount) if name in ours.SIGNED else (amount,):
                        found = np.asarray(operate(image, name, signed, ours.FILTERS[interpolation]))
                        apart = np.abs(found.astype(int) - torchvisions(image, name, signed, mode))
                        # torchvision turns a slope into degrees and back, which moves its last bit
                        assert apart.max() <= name.startswith("Shear"), (size, kind, signed)
                        assert (apart > 0).mean() < 0.01


@pytest.mark.parametrize(("span", "theirs"), [(RAND_AUGMENT, tv.RandAugment), (TRIVIAL_AUGMENT, tv.TrivialAugmentWide)])
def test_the_spaces_are_torchvisions_operation_by_operation_and_strength_by_strength(
    span: ours.Span, theirs: type[tv.RandAugment | tv.TrivialAugmentWide]
) -> None:
    space = theirs._AUGMENTATION_SPACE
    assert set(space) == set(OPERATIONS)
    for name, (magnitudes_of, signed) in space.items():
        assert (name in ours.SIGNED) == signed
        magnitudes = magnitudes_of(31, 210, 320)
        for strength in range(31) if magnitudes is not None else ():
            amount = amount_of(name, span, (320, 210), strength)
            level = amount / 255 if name == "Solarize" else amount
            assert level == pytest.approx(float(magnitudes[strength]), rel=1e-6, abs=1e-6), (name, strength)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["photo", "grey", "flat"])
@pytest.mark.parametrize("turns", [-0.5, -0.31, -0.004, 0.0, 0.02, 0.25, 0.5])
def test_turned_hues_are_torchvisions(size: tuple[int, int], kind: str, turns: float) -> None:
    image = picture(*size, kind)
    assert np.array_equal(np.asarray(ours.turn_hue(image, turns)), np.asarray(F.adjust_hue(image, turns)))


def test_colour_jitter_is_torchvisions_given_the_same_order_and_amounts() -> None:
    most = [0.4, 0.3, 0.2, 0.1]
    orders = set()
    for numbers in uniform(60, 8).tolist():
        order = np.argsort(numbers[:4])
        orders.add(tuple(order.tolist()))
        amounts = [(2 * number - 1) * change for number, change in zip(numbers[4:8], most, strict=True)]
        params = {
            f"{name}_factor": 1 + amount
            for name, amount in zip(("brightness", "contrast", "saturation"), amounts[:3], strict=True)
        }
        params |= {"fn_idx": torch.from_numpy(order), "hue_factor": amounts[3]}
        wanted = tv.ColorJitter(*most).transform(picture(31, 17), params)
        assert np.array_equal(np.asarray(ours.color_jitter(picture(31, 17), most, numbers)), np.asarray(wanted))
    assert len(orders) > 20


def test_changes_of_size_nought_are_left_out_of_the_jitter() -> None:
    image = picture(31, 17)
    numbers = uniform(1, 8)[0].tolist()
    assert ours.color_jitter(image, [0, 0, 0, 0], numbers) is image
    only = ours.color_jitter(image, [0, 0, 0.5, 0], numbers)
    assert np.array_equal(np.asarray(only), np.asarray(F.adjust_saturation(image, 1 + (2 * numbers[6] - 1) * 0.5)))


def test_3_augment_is_grey_solarized_or_blurred_and_then_jittered_as_published() -> None:
    image = picture(64, 48)
    grey, solar = F.rgb_to_grayscale(image, 3), ImageOps.solarize(image)
    blurred = image.filter(ImageFilter.GaussianBlur(0.1 + 0.25 * 1.9))
    config = config_of(Augment.three_augment)
    for choice, middle in ((0.1, grey), (0.5, solar), (0.9, blurred)):
        assert np.array_equal(np.asarray(ours.three_augment(image, choice, 0.25)), np.asarray(middle))
        numbers = np.array([*uniform(1, 8)[0][:8], choice, 0.25, 0.0])
        wanted = ours.color_jitter(middle, (0.3, 0.3, 0.3, 0.0), numbers.tolist())
        assert np.array_equal(augment(np.asarray(image), config, numbers), np.asarray(wanted))
        own = replace(config, color_jitter=[0.0, 0.0, 0.0, 0.1])
        wanted = ours.color_jitter(middle, own.color_jitter, numbers.tolist())
        assert np.array_equal(augment(np.asarray(image), own, numbers), np.asarray(wanted))


def recorded(monkeypatch: pytest.MonkeyPatch, config: DataConfig, count: int) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []

    def record(image: Image.Image, name: str, amount: float, resample: object) -> Image.Image:
        found.append((name, amount))
        return image

    monkeypatch.setattr(ours, "operate", record)
    image = np.zeros((8, 8, 3), np.uint8)
    for numbers in uniform(count, ours.numbers_needed(config)):
        augment(image, config, numbers)
    return found


def require_even(counts: list[int]) -> None:
    """A chi-squared below its mean + 5 deviations; the draw is seeded, so this cannot flicker."""
    expected, freedom = sum(counts) / len(counts), len(counts) - 1
    chi2 = sum((count - expected) ** 2 / expected for count in counts)
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom), counts


def test_trivialaugment_draws_operations_strengths_and_signs_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    found = recorded(monkeypatch, config_of(Augment.trivialaugment), 30_000)
    names = Counter(name for name, _ in found)
    require_even([names[name] for name in OPERATIONS])
    for name in ("ShearX", "Rotate", "Brightness"):
        amounts = [amount for other, amount in found if other == name]
        top = amount_of(name, TRIVIAL_AUGMENT, (8, 8), 30)
        strengths = Counter(round(abs(amount) / top * 30) for amount in amounts)
        require_even([strengths[strength] for strength in range(31)])
        require_even([sum(amount > 0 for amount in amounts), sum(amount < 0 for amount in amounts)])
    levels = Counter(amount for name, amount in found if name == "Solarize")
    assert len(levels) == 31
    assert min(levels) == 0


@pytest.mark.parametrize("layers", [1, 2, 5, 16])
def test_randaugment_draws_its_layers_evenly_with_the_given_strength(
    monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    config = config_of(Augment.randaugment, augment_layers=layers, augment_magnitude=9.0)
    found = recorded(monkeypatch, config, 12_000 // layers)
    assert len(found) == 12_000 // layers * layers
    for layer in range(layers):
        names = Counter(name for name, _ in found[layer::layers])
        require_even([names[name] for name in OPERATIONS])
    shears = {amount for name, amount in found if name == "ShearX"}
    assert sorted(shears) == pytest.approx([-0.09, 0.09])
    if layers == 2:
        pairs = Counter(zip((name for name, _ in found[::2]), (name for name, _ in found[1::2]), strict=True))
        require_even([pairs[a, b] for a in OPERATIONS for b in OPERATIONS])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 512), (3, 2), (64, 48)])
@pytest.mark.parametrize("kind", ["photo", "grey", "flat"])
def test_every_policy_keeps_shape_and_type_of_any_image(policy: Augment, size: tuple[int, int], kind: str) -> None:
    config = config_of(policy, color_jitter=[0.4, 0.4, 0.4, 0.1])
    image = np.asarray(picture(*size, kind))
    before = image.copy()
    for numbers in uniform(40, ours.numbers_needed(config)):
        found = augment(image, config, numbers)
        assert (found.shape, found.dtype) == (image.shape, np.uint8)
    assert np.array_equal(image, before)


def batch_of(count: int, side: int = 24) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, 3, side, side), np.uint8)


@pytest.mark.parametrize("policy", POLICIES[:3])
def test_a_samples_augmentation_depends_on_seed_epoch_id_and_copy_alone(policy: Augment) -> None:
    config = config_of(policy)
    ids, copies = np.arange(30) * 1_000_003, np.arange(30) % 2

    def run(
        rows: np.ndarray, key: tuple[int, int] = (3, 1), ids: np.ndarray = ids, copies: np.ndarray = copies
    ) -> np.ndarray:
        images = batch_of(30)[rows]
        ours.augment_batch(images, config, key, ids[rows], copies[rows])
        return images

    everything = np.arange(30)
    whole = run(everything)
    for rows in (everything[::-1], np.array([7]), np.array([4, 4, 9]), everything[::3]):
        assert np.array_equal(run(rows), whole[rows])
    for other in (run(everything, (4, 1)), run(everything, (3, 2)), run(everything, copies=copies + 2)):
        assert (other != whole).any((1, 2, 3)).mean() > 0.7


def test_without_a_policy_images_stay_as_they_are() -> None:
    images = batch_of(4)
    assert not ours.is_augmented(config_of(Augment.none))
    ours.augment_batch(images, config_of(Augment.none), (0, 0), np.arange(4), np.zeros(4, int))
    assert np.array_equal(images, batch_of(4))


def test_fresh_processes_augment_to_the_same_pixels() -> None:
    code = (
        "import hashlib, numpy as np; from dataclasses import replace; from orchestrator.compose import compose\n"
        "from orchestrator.data.augment import augment_batch; from orchestrator.options import Augment\n"
        "images = np.random.default_rng(5).integers(0, 256, (16, 3, 24, 24), np.uint8)\n"
        "config = replace(compose([]).config.data, augment=Augment.randaugment, color_jitter=[0.4, 0.4, 0.4, 0.1])\n"
        "augment_batch(images, config, (3, 7), np.arange(16) + 2**40, np.arange(16))\n"
        "print(hashlib.sha256(images.tobytes()).hexdigest())"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    told = {
        subprocess.check_output([sys.executable, "-c", code], env=environment | {"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    }
    assert len(told) == 1
