"""Pixels: evaluation equals Pillow's resize and a centre crop, training draws what its key says and nothing else."""

from __future__ import annotations

import collections
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from orchestrator.compose import compose
from orchestrator.config import DataConfig
from orchestrator.data import transforms
from orchestrator.data.order import keyed_rng
from orchestrator.data.transforms import Preprocessing, eval_pixels, preprocessing_of, train_pixels
from orchestrator.options import Crop, Interpolation

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.fixture(scope="module")
def config() -> DataConfig:
    return replace(compose(["data=imagenet"]).config.data, image_size=16, eval_resize=20, flip=0.0)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 in which every pixel matters."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def smooth(width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: another slope in each channel, the same picture at any size."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return (np.stack([x, y, (x + y) / 2], -1) * 255).astype(np.uint8)


def coordinates(width: int, height: int) -> np.ndarray:
    """Pixels that say where they are: red is x, green is y."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x, y, np.full_like(x, 9)], -1).astype(np.uint8)


def spec_of(size: int, resize: int, interpolation: str = "bilinear") -> Preprocessing:
    return Preprocessing(size, resize, interpolation, (0.5,) * 3, (0.5,) * 3)


def reference(image: np.ndarray, size: int, resize: int, interpolation: str) -> np.ndarray:
    """Short side to `resize`, then the central square: as two steps, with Pillow alone."""
    height, width = image.shape[:2]
    scale = resize / min(width, height)
    picture = Image.fromarray(image).resize((round(width * scale), round(height * scale)), FILTERS[interpolation])
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def largest_difference(left: np.ndarray, right: np.ndarray) -> int:
    return int(np.abs(left.astype(int) - right.astype(int)).max())


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("width", "height", "size", "resize"), [
    (32, 32, 16, 16), (64, 32, 16, 16), (32, 96, 16, 20), (40, 40, 32, 40), (80, 120, 24, 40), (16, 24, 24, 32),
    (500, 250, 224, 256), (256, 512, 224, 256), (8, 8, 8, 8), (30, 90, 7, 15),
])  # fmt: skip
def test_evaluation_equals_a_resize_and_a_centre_crop(
    width: int, height: int, size: int, resize: int, interpolation: str
) -> None:
    image = noise(width, height)
    pixels = eval_pixels(image, spec_of(size, resize, interpolation))
    assert pixels.shape == (3, size, size)
    assert pixels.dtype == np.uint8
    assert largest_difference(pixels, reference(image, size, resize, interpolation)) <= 1


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (333, 257), (1000, 229), (17, 301), (224, 225)])
def test_evaluation_agrees_where_the_reference_rounds_to_whole_pixels(width: int, height: int) -> None:
    image = smooth(width, height)
    assert largest_difference(eval_pixels(image, spec_of(224, 256)), reference(image, 224, 256, "bilinear")) <= 2


@pytest.mark.parametrize(("width", "height"), [(32, 32), (64, 16), (7, 40)])
def test_without_a_resize_the_whole_image_is_squeezed(width: int, height: int) -> None:
    image = noise(width, height)
    squeezed = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(eval_pixels(image, spec_of(16, 0)), squeezed)


def test_an_image_of_the_right_size_passes_untouched(config: DataConfig) -> None:
    image = noise(16, 16)
    wanted = image.transpose(2, 0, 1)
    assert np.array_equal(eval_pixels(image, spec_of(16, 0)), wanted)
    assert np.array_equal(eval_pixels(image, spec_of(16, 16)), wanted)
    for crop in (replace(config, crop=Crop.none), replace(config, crop=Crop.pad, padding=0)):
        pixels = train_pixels(image, crop, keyed_rng(0))
        assert np.array_equal(pixels, wanted)
        assert not np.shares_memory(pixels, image)


def test_what_evaluation_does_is_taken_from_the_config(config: DataConfig) -> None:
    said = preprocessing_of(replace(config, interpolation=Interpolation.bicubic))
    assert said == Preprocessing(16, 20, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("crop", list(Crop))
def test_training_pixels_depend_on_the_key_alone(config: DataConfig, crop: Crop) -> None:
    config, image = replace(config, crop=crop, flip=0.5, padding=4), noise(37, 23)
    first = [train_pixels(image, config, keyed_rng(3, n)) for n in range(8)]
    np.random.seed(1)
    again = [train_pixels(image, config, keyed_rng(3, n)) for n in reversed(range(8))]
    assert all(np.array_equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert len({pixels.tobytes() for pixels in first}) > (1 if crop is Crop.none else 4)
    assert all(pixels.shape == (3, 16, 16) and pixels.flags.c_contiguous for pixels in first)


@pytest.mark.parametrize("crop", list(Crop))
@pytest.mark.parametrize("chance", [0.0, 0.3, 1.0])
def test_a_flip_mirrors_left_and_right_as_often_as_asked(config: DataConfig, crop: Crop, chance: float) -> None:
    config, image = replace(config, crop=crop, padding=2), noise(16, 16)
    flipped = 0
    for n in range(400):
        plain = train_pixels(image, replace(config, flip=0.0), keyed_rng(n))
        pixels = train_pixels(image, replace(config, flip=chance), keyed_rng(n))
        mirrored = np.array_equal(pixels, plain[:, :, ::-1])
        assert mirrored or np.array_equal(pixels, plain)
        flipped += mirrored
    assert flipped == 400 * chance if chance in (0, 1) else abs(flipped / 400 - chance) < 0.08


@pytest.mark.parametrize("padding", [1, 3])
def test_a_padded_crop_reaches_every_offset_equally_and_fills_with_black(config: DataConfig, padding: int) -> None:
    config, image = replace(config, crop=Crop.pad, padding=padding), coordinates(16, 16) + 1
    padded = np.pad(image.transpose(2, 0, 1), ((0, 0), (padding, padding), (padding, padding)))
    cuts = {
        padded[:, top : top + 16, left : left + 16].tobytes(): (left, top)
        for left in range(2 * padding + 1)
        for top in range(2 * padding + 1)
    }
    draws = 60 * len(cuts)
    met = collections.Counter(cuts[train_pixels(image, config, keyed_rng(n)).tobytes()] for n in range(draws))
    assert len(met) == len(cuts) == (2 * padding + 1) ** 2
    assert 20 < min(met.values()) <= max(met.values()) < 120


def boxes(config: DataConfig, width: int, height: int, count: int) -> np.ndarray:
    """(count, 4) left, top, right, bottom as training draws them."""
    return np.array([transforms._random_box(width, height, config, keyed_rng(n)) for n in range(count)])


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (3, 2), (64, 48), (500, 375), (30, 900)])
def test_random_crops_stay_inside_the_image(config: DataConfig, width: int, height: int) -> None:
    left, top, right, bottom = boxes(config, width, height, 300).T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= width
    assert bottom.max() <= height
    assert (right - left).min() > 0
    assert (bottom - top).min() > 0


def test_random_crops_have_the_areas_and_ratios_of_the_config(config: DataConfig) -> None:
    config = replace(config, crop_scale=[0.2, 0.6], crop_ratio=[0.5, 2.0])
    left, top, right, bottom = boxes(config, 1000, 1000, 4000).T
    width, height = right - left, bottom - top
    area, ratio = width * height / 1e6, np.log(width / height)
    assert 0.199 < area.min() < 0.21
    assert 0.59 < area.max() < 0.601
    assert abs(ratio).max() < math.log(2) + 0.01
    assert abs(ratio).max() > math.log(2) - 0.02
    assert abs(ratio.mean()) < 0.02
    assert abs(np.median(area) - 0.4) < 0.01
    counts = np.histogram(area, 4, (0.2, 0.6))[0]
    assert np.abs(counts / 1000 - 1).max() < 0.12
    for start, room in ((left, 1000 - width), (top, 1000 - height)):
        place = start[room > 50] / room[room > 50]
        assert np.abs(np.histogram(place, 4, (0, 1))[0] / len(place) - 0.25).max() < 0.03


def test_an_image_too_narrow_for_any_crop_gives_its_largest_central_one(config: DataConfig) -> None:
    config = replace(config, crop_scale=[1.0, 1.0], crop_ratio=[0.75, 4 / 3])
    assert boxes(config, 30, 900, 3).tolist() == [[0, 430, 30, 470]] * 3
    assert boxes(config, 900, 30, 3).tolist() == [[430, 0, 470, 30]] * 3
    assert boxes(config, 40, 40, 1).shape == (1, 4)


def test_a_random_crop_shows_the_box_that_was_drawn(config: DataConfig) -> None:
    config, image = replace(config, crop_scale=[0.1, 0.5]), smooth(200, 120)
    for n in range(20):
        left, top, right, bottom = transforms._random_box(200, 120, config, keyed_rng(n))
        pixels = train_pixels(image, config, keyed_rng(n)).astype(float) / 255
        assert abs(pixels[0].mean() - (left + right) / 2 / 200) < 0.01
        assert abs(pixels[1].mean() - (top + bottom) / 2 / 120) < 0.01
        assert abs((pixels[0, 0, -1] - pixels[0, 0, 0]) / (15 / 16) - (right - left) / 200) < 0.03
