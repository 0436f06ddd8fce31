"""Mixed steps: torchvision's pixels and losses for the same drawn numbers, the numbers keyed, the rest left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from orchestrator.compose import compose
from orchestrator.config import RecipeConfig, RunConfig
from orchestrator.keyed import draws, keyed_rng
from orchestrator.model.loss import Targets, presence, row_losses, soft_targets
from orchestrator.model.mixing import (
    ERASE_BLOCKS,
    Mix,
    Mixing,
    Prepare,
    cut_box,
    draw_mix,
    erase_rectangles,
    mixes,
    targets_of,
)
from orchestrator.options import Loss

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLASSES = 7
ROOT = Path(__file__).parents[2]


@cache
def config_of(*overrides: str) -> RunConfig:
    return compose(overrides).config


def recipe_of(**keys: object) -> RecipeConfig:
    return replace(config_of().recipe, **keys)  # pyright: ignore[reportArgumentType]


def batch_of(rows: int, height: int = 12, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (rows, 3, height, width), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, CLASSES, (rows,), generator=generator)


def normalised(images: torch.Tensor) -> torch.Tensor:
    return v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), MEAN, STD)


def rectangles_of(count: int, probability: float, height: int = 12, width: int = 16) -> torch.Tensor:
    ids = np.arange(count)
    numbers = draws((0, "erase"), ids, np.zeros_like(ids), ERASE_BLOCKS)
    return torch.from_numpy(erase_rectangles(numbers, probability, width, height))


def as_torchvision(images: torch.Tensor, labels: torch.Tensor, mix: Mix) -> tuple[torch.Tensor, torch.Tensor]:
    """torchvision pairs a row with the one before it; with two rows that is the pairing of `blend`."""
    if mix.box is None:
        transform, params = v2.MixUp(num_classes=CLASSES), {"lam": mix.share}
    else:
        transform, params = v2.CutMix(num_classes=CLASSES), {"box": mix.box, "lam_adjusted": mix.share}
    params |= {"labels": labels, "batch_size": len(labels)}
    return transform.transform(images, params), transform.transform(labels, params)


MIXES = [
    Mix(0.3, None),
    Mix(1.0, None),
    Mix(0.0, None),
    cut_box(0.4, (0.2, 0.9), 16, 12),
    cut_box(1.0, (0.5, 0.5), 16, 12),
]


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("rows", [2, 8])
def test_pixels_and_soft_targets_are_torchvisions_given_the_same_share_and_box(mix: Mix, rows: int) -> None:
    images, labels = batch_of(rows)
    found = Prepare(MEAN, STD, channels_last=False)(images, None, mix, rows)
    shares = soft_targets(targets_of(labels, mix, rows), CLASSES)
    torch.testing.assert_close(shares.sum(1), torch.ones(rows))
    for row in range(rows // 2):
        pair = [row, row + rows // 2]
        pixels, wanted = as_torchvision(normalised(images)[pair], labels[pair], mix)
        torch.testing.assert_close(found[pair], pixels, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(shares[pair], wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mix", [None, *MIXES], ids=str)
def test_the_loss_of_two_labels_is_that_of_the_soft_target_smoothed_as_torch_and_timm_do(
    mix: Mix | None, smoothing: float
) -> None:
    _, labels = batch_of(9)
    targets = targets_of(labels, mix, 9)
    logits = torch.randn(9, CLASSES, generator=torch.Generator().manual_seed(0))
    found = row_losses(logits, targets, recipe_of(label_smoothing=smoothing))
    soft = soft_targets(targets, CLASSES)
    wanted = F.cross_entropy(logits, soft, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found, wanted)
    by_hand = -(soft * (1 - smoothing) + smoothing / CLASSES) * logits.log_softmax(1)
    torch.testing.assert_close(found, by_hand.sum(1))


def test_bce_counts_a_class_as_there_from_a_fifth_of_the_image_on() -> None:
    targets = Targets(torch.tensor([0, 1]), torch.tensor([2, 1]), 0.85)
    assert presence(targets, 3, 0.0).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert presence(targets._replace(share=0.5), 3, 0.0).tolist() == [[1, 0, 1], [0, 1, 0]]
    smoothed = presence(targets._replace(share=0.5), 3, 0.3)
    torch.testing.assert_close(smoothed, torch.tensor([[0.8, 0.1, 0.8], [0.1, 0.8, 0.1]]))
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    wanted = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none").mean(1)
    recipe = recipe_of(loss=Loss.bce, label_smoothing=0.3)
    torch.testing.assert_close(row_losses(logits, targets._replace(share=0.5), recipe), wanted)


def test_hits_are_counted_against_the_label_with_the_larger_share() -> None:
    own, partner = torch.tensor([0, 1]), torch.tensor([2, 3])
    assert Targets(own).dominant is own
    assert Targets(own, partner, 0.5).dominant is own
    assert Targets(own, partner, 0.49).dominant is partner


@pytest.mark.parametrize(("rows", "padding"), [(8, 0), (9, 0), (9, 4), (2, 1), (1, 3), (0, 3)])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_rows_of_padding_are_neither_mixed_nor_mixed_in(rows: int, padding: int, kind: str) -> None:
    images, labels = batch_of(rows + padding)
    ids = torch.tensor([*range(rows)] + [-1] * padding)
    mixing = Mixing(config_of(f"recipe.{kind}=1.0"))
    found, targets = mixing(images, labels, ids, 3, 0)
    other = images.clone()
    other[rows:] = 255 - other[rows:]
    again, _ = mixing(other, labels, ids, 3, 0)
    plain = mixing.prepare(images, None, None, 0)
    assert torch.equal(found[:rows], again[:rows])
    assert torch.equal(found[rows:], plain[rows:])
    assert (targets.partner is None) == (rows < 2)
    if targets.partner is not None:
        assert torch.equal(targets.partner[rows:], labels[rows:])
        apart = rows // 2
        assert targets.partner[:rows].tolist() == labels[:rows].roll(-apart).tolist()


@pytest.mark.parametrize(("width", "height"), [(16, 12), (1, 1), (224, 160)])
def test_a_box_is_torchvisions_and_its_share_is_what_the_box_leaves(width: int, height: int) -> None:
    for share, x, y in np.random.default_rng(0).random((300, 3)).tolist():
        mix = cut_box(share, (x, y), width, height)
        assert isinstance(mix.box, tuple)
        left, top, right, bottom = mix.box
        assert 0 <= left <= right <= width
        assert 0 <= top <= bottom <= height
        assert mix.share == 1 - (right - left) * (bottom - top) / (width * height)
        half = 0.5 * (1 - share) ** 0.5
        centre, sides = (int(x * width), int(y * height)), (int(half * width), int(half * height))
        assert (left, right) == (max(0, centre[0] - sides[0]), min(width, centre[0] + sides[0]))
        assert (top, bottom) == (max(0, centre[1] - sides[1]), min(height, centre[1] + sides[1]))


def test_pixels_outside_the_box_and_the_rectangles_are_untouched() -> None:
    images, _ = batch_of(6)
    prepare = Prepare(MEAN, STD, channels_last=False)
    plain = prepare(images, None, None, 0)
    mix = cut_box(0.5, (0.5, 0.5), 16, 12)
    assert isinstance(mix.box, tuple)
    left, top, right, bottom = mix.box
    outside = torch.ones(12, 16, dtype=torch.bool)
    outside[top:bottom, left:right] = False
    mixed = prepare(images, None, mix, 6)
    assert torch.equal(mixed[..., outside], plain[..., outside])
    assert torch.equal(mixed[..., ~outside], plain.roll(-3, 0)[..., ~outside])
    rectangles = rectangles_of(6, 0.7)
    erased = prepare(images, rectangles, None, 0)
    for row, (left, top, right, bottom) in enumerate(rectangles.tolist()):
        wanted = plain[row].clone()
        wanted[:, top:bottom, left:right] = 0
        assert torch.equal(erased[row], wanted)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.25, 1.0])
def test_rectangles_have_torchvisions_shares_and_ratios_at_the_given_rate(probability: float) -> None:
    found = rectangles_of(20_000, probability, 96, 128).numpy().astype(float)
    left, top, right, bottom = found.T
    assert ((left >= 0) & (left <= right) & (right <= 128) & (top >= 0) & (top <= bottom) & (bottom <= 96)).all()
    erased = right > left
    assert erased.mean() == pytest.approx(probability, abs=0.012)
    if not probability:
        return
    wide, tall = (right - left)[erased], (bottom - top)[erased]
    share, ratio = wide * tall / (96 * 128), tall / wide
    assert 0.015 < share.min() < 0.03 < 0.3 < share.max() < 0.34
    assert 0.27 < ratio.min() < 0.36 < 2.8 < ratio.max() < 3.6
    torch.manual_seed(0)
    theirs = [v2.RandomErasing(p=1).make_params([torch.empty(3, 96, 128)]) for _ in range(3000)]
    assert share.mean() == pytest.approx(np.mean([p["h"] * p["w"] for p in theirs]) / (96 * 128), abs=0.01)
    assert tall.mean() == pytest.approx(np.mean([p["h"] for p in theirs]), rel=0.04)
    assert left[erased].mean() == pytest.approx(np.mean([p["j"] for p in theirs]), rel=0.06)


def test_images_too_small_for_a_rectangle_are_left_alone() -> None:
    left, top, right, bottom = rectangles_of(50, 1.0, 1, 1).T
    assert not ((right - left) * (bottom - top)).any()


@pytest.mark.parametrize(
    ("keys", "mixup", "cutmix"),
    [
        ({"mixup": 0.2}, 1.0, 0.0),
        ({"cutmix": 1.0}, 0.0, 1.0),
        ({"mixup": 0.2, "cutmix": 1.0}, 0.5, 0.5),
        ({"mixup": 0.2, "cutmix": 1.0, "mix_probability": 0.4}, 0.2, 0.2),
        ({"mix_probability": 1.0}, 0.0, 0.0),
    ],
)
def test_steps_are_mixed_as_often_and_by_what_the_recipe_says(keys: dict, mixup: float, cutmix: float) -> None:
    recipe = recipe_of(**keys)
    found = [draw_mix(recipe, keyed_rng(0, step, 0, "mix"), 64, 64) for step in range(2000)]
    mixed = [mix for mix in found if mix is not None]
    assert sum(mix.box is None for mix in mixed) / 2000 == pytest.approx(mixup, abs=0.03)
    assert sum(mix.box is not None for mix in mixed) / 2000 == pytest.approx(cutmix, abs=0.03)
    shares = np.array([mix.share for mix in mixed if mix.box is None])
    if len(shares):
        assert shares.mean() == pytest.approx(0.5, abs=0.05)
        assert shares.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.1)  # of Beta(a, a)


@pytest.mark.parametrize(("channels_last", "precision"), list(product((False, True), ("fp32", "bf16"))))
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_memory_format_and_the_dtype_are_those_of_the_network(
    channels_last: bool, precision: str, kind: str
) -> None:
    overrides = f"compute.channels_last={str(channels_last).lower()}", f"compute.precision={precision}"
    images, labels = batch_of(8)
    mixing = Mixing(config_of(f"recipe.{kind}=1.0", "recipe.erase=0.5", *overrides))
    found, _ = mixing(images, labels, torch.arange(8), 1, 0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert found.is_contiguous(memory_format=layout)
    assert found.dtype is {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    exact, _ = Mixing(config_of(f"recipe.{kind}=1.0", "recipe.erase=0.5"))(images, labels, torch.arange(8), 1, 0)
    assert torch.equal(found, exact.to(found.dtype))


ALL = ("recipe.mixup=0.2", "recipe.cutmix=1.0", "recipe.erase=0.5")


def test_a_step_mixes_the_same_whenever_it_is_reached_and_no_global_generator_is_touched() -> None:
    images, labels = batch_of(8)
    ids = torch.arange(8)
    state = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # pyright: ignore[reportArgumentType,reportCallIssue,reportIndexIssue]
    whole = Mixing(config_of(*ALL))
    run = [whole(images, labels, ids, step, part) for step in range(5) for part in range(2)]
    resumed = Mixing(config_of(*ALL))
    for unit in (9, 4):
        pixels, targets = resumed(images, labels, ids, *divmod(unit, 2))
        assert torch.equal(pixels, run[unit][0])
        assert targets.share == run[unit][1].share
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == np.random.get_state()[1].tobytes()  # pyright: ignore[reportArgumentType,reportCallIssue,reportIndexIssue]
    assert len({targets.share for _, targets in run}) == len(run)
    other, _ = Mixing(config_of(*ALL, "seed=1"))(images, labels, ids, 0, 0)
    assert not torch.equal(other, run[0][0])


def test_a_samples_rectangle_does_not_depend_on_its_row() -> None:
    images, labels = batch_of(8)
    mixing = Mixing(config_of("recipe.erase=0.6"))
    ids = torch.tensor([5, 80, 7, 3, 2**40, 11, 12, 13])
    whole, _ = mixing(images, labels, ids, 2, 0)
    order = torch.tensor([3, 0, 7, 4])
    part, _ = mixing(images[order], labels[order], ids[order], 2, 1)
    assert torch.equal(part, whole[order])
    assert not torch.equal(mixing(images, labels, ids, 3, 0)[0], whole)


@pytest.mark.slow
def test_fresh_processes_mix_to_the_same_bits() -> None:
    code = (
        "import hashlib, torch\n"
        "from orchestrator.compose import compose\nfrom orchestrator.model.mixing import Mixing\n"
        "images = torch.arange(8 * 3 * 9 * 9).view(8, 3, 9, 9).to(torch.uint8)\n"
        f"mixing = Mixing(compose({list(ALL)!r}).config)\n"
        "pixels = [mixing(images, torch.arange(8), torch.arange(8), step, 0)[0] for step in range(6)]\n"
        "print(hashlib.sha256(torch.stack(pixels).numpy().tobytes()).hexdigest())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    told = {
        subprocess.check_output([sys.executable, "-c", code], env=environment | {"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    }
    assert len(told) == 1


def test_images_given_are_not_changed() -> None:
    images, labels = batch_of(8)
    before = images.clone()
    Mixing(config_of(*ALL))(images, labels, torch.arange(8), 0, 0)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("overrides", "wanted"), [
    ((), False), (("recipe.mixup=0.2", "recipe.mix_probability=0.0"), False), (("recipe.erase=0.1",), True),
    (("recipe.cutmix=1.0",), True),
])  # fmt: skip
def test_only_a_recipe_that_asks_for_it_mixes(overrides: tuple[str, ...], wanted: bool) -> None:
    assert mixes(config_of(*overrides).recipe) == wanted


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_it_is_one_graph_that_serves_every_share_and_box() -> None:
    images, _ = batch_of(8)
    prepare, rectangles = Prepare(MEAN, STD, channels_last=True), rectangles_of(8, 0.5)
    compiled = torch.compile(prepare, fullgraph=True)
    torch._dynamo.reset()  # pyright: ignore[reportAttributeAccessIssue]
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):  # pyright: ignore[reportAttributeAccessIssue]
        for share in (0.1, 0.5, 0.9):
            found = compiled(images, rectangles, Mix(torch.tensor(share), None), 8)
            torch.testing.assert_close(found, prepare(images, rectangles, Mix(share, None), 8))
        for box in ((0, 0, 5, 5), (1, 0, 16, 12), (3, 3, 3, 9)):
            found = compiled(images, rectangles, Mix(torch.tensor(0.5), torch.tensor(box)), 8)
            torch.testing.assert_close(found, prepare(images, rectangles, Mix(0.5, box), 8))
