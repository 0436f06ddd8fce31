"""Pixels: evaluation equals Pillow's resize and a centre crop, training draws what its key says and nothing else."""

from __future__ import annotations

import collections
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.compose import compose
from orchestrator.config import DataConfig
from orchestrator.data.transforms import (
    BLOCKS,
    CROP_TRIES,
    Preprocessing,
    eval_pixels,
    eval_views,
    preprocessing_of,
    random_boxes,
    shift,
    show,
    train_size,
    train_views,
)
from orchestrator.keyed import draws
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


def numbers_of(count: int, key: int = 0) -> np.ndarray:
    """(count, BLOCKS, 4): the numbers of samples 0 to count - 1."""
    return draws((key, "test"), np.arange(count), np.zeros(count, np.int64), BLOCKS)


def train_pixels(image: np.ndarray, config: DataConfig, count: int, key: int = 0) -> np.ndarray:
    """(count, 3, S, S) uint8: what training shows of `count` samples that are all the same image."""
    numbers = numbers_of(count, key)
    views = train_views(np.array([image.shape[1::-1]] * count), numbers, config)
    rows = [show(image, views, row, config.image_size, config.interpolation) for row in range(count)]
    return shift(np.stack(rows), numbers, config.padding) if config.crop is Crop.pad else np.stack(rows)


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
        assert np.array_equal(train_pixels(image, crop, 1)[0], wanted)


def test_evaluations_views_of_a_batch_are_those_of_each_image_alone() -> None:
    sizes = np.array([(500, 375), (375, 500), (17, 301), (224, 224), (1, 1)])
    for spec in (spec_of(224, 256), spec_of(224, 0), spec_of(160, 160)):
        together = eval_views(sizes, spec)
        assert not together.clip
        assert not together.flips.any()
        for row, (width, height) in enumerate(sizes.tolist()):
            left, top, right, bottom = together.boxes[row].tolist()
            assert np.array_equal(eval_views(sizes[row : row + 1], spec).boxes[0], together.boxes[row])
            assert (left + right, top + bottom) == (width, height), "not central"
            side = min(width, height) * spec.image_size / spec.eval_resize if spec.eval_resize else None
            assert (right - left, bottom - top) == pytest.approx((side, side) if side else (width, height))


def test_what_evaluation_does_is_taken_from_the_config(config: DataConfig) -> None:
    said = preprocessing_of(replace(config, interpolation=Interpolation.bicubic))
    assert said == Preprocessing(16, 20, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_evaluation_may_have_a_size_of_its_own(config: DataConfig) -> None:
    assert preprocessing_of(replace(config, eval_size=18)).image_size == 18
    assert preprocessing_of(replace(config, eval_size=0)).image_size == config.image_size


@pytest.mark.parametrize("crop", list(Crop))
def test_training_pixels_depend_on_the_samples_numbers_alone(config: DataConfig, crop: Crop) -> None:
    config, image = replace(config, crop=crop, flip=0.5, padding=4), noise(37, 23)
    first = train_pixels(image, config, 8, key=3)
    np.random.seed(1)
    assert np.array_equal(train_pixels(image, config, 8, key=3), first)
    assert len({pixels.tobytes() for pixels in first}) > (1 if crop is Crop.none else 4)
    assert first.shape == (8, 3, 16, 16)
    sizes, numbers = np.random.default_rng(0).integers(1, 300, (40, 2)), numbers_of(40)
    together = train_views(sizes, numbers, config)
    for rows in (np.arange(40)[::-1], np.array([11]), np.array([5, 5, 39])):
        some = train_views(sizes[rows], numbers[rows], config)
        assert np.array_equal(some.boxes, together.boxes[rows])
        assert np.array_equal(some.flips, together.flips[rows])
        assert some.clip


@pytest.mark.parametrize("crop", list(Crop))
@pytest.mark.parametrize("chance", [0.0, 0.3, 1.0])
def test_a_flip_mirrors_left_and_right_as_often_as_asked(config: DataConfig, crop: Crop, chance: float) -> None:
    config, image = replace(config, crop=crop, padding=0), noise(16, 16)
    plain = train_pixels(image, replace(config, flip=0.0), 400)
    pixels = train_pixels(image, replace(config, flip=chance), 400)
    mirrored = [np.array_equal(a, b[:, :, ::-1]) for a, b in zip(pixels, plain, strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(pixels, plain, strict=True)]
    assert all(a or b for a, b in zip(mirrored, same, strict=True))
    flipped = sum(mirrored)
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
    pixels = train_pixels(image, config, 60 * len(cuts))
    met = collections.Counter(cuts[row.tobytes()] for row in pixels)
    assert len(met) == len(cuts) == (2 * padding + 1) ** 2
    assert 20 < min(met.values()) <= max(met.values()) < 120


def test_flip_and_both_shifts_are_drawn_apart(config: DataConfig) -> None:
    config, image = replace(config, crop=Crop.pad, padding=1, flip=0.5), coordinates(16, 16) + 1
    cuts = {}
    for flip in (False, True):
        mirrored = image[:, ::-1] if flip else image
        padded = np.pad(mirrored.transpose(2, 0, 1), ((0, 0), (1, 1), (1, 1)))
        cuts |= {padded[:, y : y + 16, x : x + 16].tobytes(): (flip, x, y) for x in range(3) for y in range(3)}
    met = collections.Counter(cuts[row.tobytes()] for row in train_pixels(image, config, 1800))
    assert len(met) == 18
    assert 60 < min(met.values()) <= max(met.values()) < 145


def boxes(config: DataConfig, width: int, height: int, count: int) -> np.ndarray:
    """(count, 4) left, top, right, bottom as training draws them."""
    return random_boxes(np.array([(width, height)] * count), numbers_of(count)[:, :CROP_TRIES], config)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (3, 2), (64, 48), (500, 375), (30, 900)])
def test_random_crops_are_whole_pixels_inside_the_image(config: DataConfig, width: int, height: int) -> None:
    drawn = boxes(config, width, height, 300)
    assert (drawn == np.rint(drawn)).all()
    left, top, right, bottom = drawn.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= width
    assert bottom.max() <= height
    assert (right - left).min() > 0
    assert (bottom - top).min() > 0


def by_torchvision(config: DataConfig, width: int, height: int, count: int) -> np.ndarray:
    """(count, 4) boxes that torchvision's RandomResizedCrop draws."""
    from torchvision.transforms import RandomResizedCrop

    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [RandomResizedCrop.get_params(image, config.crop_scale, config.crop_ratio) for _ in range(count)]
    top, left, h, w = np.array(drawn, float).T
    return np.stack([left, top, left + w, top + h], -1)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (640, 200), (90, 120)])
@pytest.mark.parametrize("scale", [[0.08, 1.0], [0.25, 0.6], [0.9, 1.0]])
def test_boxes_are_distributed_as_torchvisions(config: DataConfig, width: int, height: int, scale: list[float]) -> None:
    """Kolmogorov-Smirnov over area, ratio and place, 4,000 boxes each; p = 0.00001, as these are 54 comparisons."""
    config = replace(config, crop_scale=scale, crop_ratio=[3 / 4, 4 / 3])
    facts = []
    for drawn in (boxes(config, width, height, 4000), by_torchvision(config, width, height, 4000)):
        left, top, right, bottom = drawn.T
        w, h = right - left, bottom - top
        facts.append((w * h, np.log(w / h), left / np.maximum(1, width - w), top / np.maximum(1, height - h), w, h))
    for ours, theirs in zip(*facts, strict=True):
        assert kolmogorov_smirnov(ours, theirs) < 2.5 * math.sqrt(2 / 4000)


def kolmogorov_smirnov(left: np.ndarray, right: np.ndarray) -> float:
    at = np.concatenate([left, right])
    shares: Any = [np.searchsorted(np.sort(one), at, side="right") / len(one) for one in (left, right)]
    return float(np.abs(shares[0] - shares[1]).max())


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


@pytest.mark.parametrize(("width", "height"), [(30, 900), (900, 30), (1, 100), (100, 1), (7, 40), (333, 21)])
def test_an_image_too_narrow_for_any_crop_gives_torchvisions_central_one(
    config: DataConfig, width: int, height: int
) -> None:
    config = replace(config, crop_scale=[1.0, 1.0], crop_ratio=[3 / 4, 4 / 3])
    wanted = by_torchvision(config, width, height, 1)[0].tolist()
    if min(width, height) > 1:
        assert boxes(config, width, height, 3).tolist() == [wanted] * 3
    else:  # torchvision rounds the longer side to 1 as well, ours likewise
        assert boxes(config, width, height, 1)[0].tolist() == wanted
    ratio = (wanted[2] - wanted[0]) / (wanted[3] - wanted[1])
    assert 0.7 < ratio < 1.4


def test_a_random_crop_shows_the_box_that_was_drawn(config: DataConfig) -> None:
    config, image = replace(config, crop_scale=[0.1, 0.5]), smooth(200, 120)
    shown = train_pixels(image, config, 20).astype(float) / 255
    for pixels, (left, top, right, bottom) in zip(shown, boxes(config, 200, 120, 20), strict=True):
        assert abs(pixels[0].mean() - (left + right) / 2 / 200) < 0.01
        assert abs(pixels[1].mean() - (top + bottom) / 2 / 120) < 0.01
        assert abs((pixels[0, 0, -1] - pixels[0, 0, 0]) / (15 / 16) - (right - left) / 200) < 0.03


@pytest.mark.parametrize("kind", list(Interpolation))
def test_a_view_that_clips_does_not_see_beyond_its_box(config: DataConfig, kind: Interpolation) -> None:
    views = train_views(np.array([(60, 50)]), numbers_of(1), replace(config, crop_scale=[0.2, 0.3]))
    left, top, right, bottom = views.boxes[0].astype(int).tolist()
    image = noise(60, 50)
    outside = np.full_like(image, 255)
    outside[top:bottom, left:right] = image[top:bottom, left:right]
    for side in (8, 64):
        assert np.array_equal(show(image, views, 0, side, kind), show(outside, views, 0, side, kind))


def test_sizes_rise_in_steps_of_32_over_the_ramp(config: DataConfig) -> None:
    config = replace(config, eval_resize=0, image_size=224, ramp_from=128, ramp_epochs=[2, 8])
    sizes = [train_size(config, epoch) for epoch in range(12)]
    assert sizes[:3] == [128] * 3
    assert sizes[8:] == [224] * 4
    assert sizes == sorted(sizes)
    assert all(size % 32 == 0 for size in sizes)
    assert len(set(sizes)) == 4
    assert sizes[5] in (160, 192)
    assert [train_size(replace(config, ramp_from=0), epoch) for epoch in range(12)] == [224] * 12
    odd = replace(config, image_size=230, ramp_from=100, ramp_epochs=[0, 5])
    assert [train_size(odd, 0), train_size(odd, 5)] == [100, 230]
    assert all(100 <= train_size(odd, epoch) <= 230 for epoch in range(6))
