"""The memory that a step will need: exact where it can be counted by hand, near a real step's elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.cli.main import main
from orchestrator.compose import compose
from orchestrator.train.footprint import Footprint, largest_rows, trace_step
from orchestrator.train.needs import needs_of, rows_of

HERE = Path(__file__).parent
CLASSES = 10
REAL = [
    (16, "model=resnet18 data=imagenet"), (32, "model=resnet18 data=imagenet"), (8, "model=resnet34 data=imagenet"),
    (8, "model=resnet50 data=imagenet"), (8, "model=resnet50 data=imagenet compute.channels_last=true"),
    (8, "recipe=rsb_a3 model=resnet50 data=imagenet"), (4, "model=resnet101 data=imagenet"),
    (256, "model=cifar_resnet20 data=cifar10"), (128, "model=cifar_resnet56 data=cifar10 recipe.ema_decay=0.99"),
    (16, "model=timm model.name=mobilenetv3_large_100 data=imagenet"),
    (8, "model=timm model.name=efficientnet_b0 data=imagenet"),
    (8, "model=timm model.name=vit_tiny_patch16_224 data=imagenet"),
    (4, "model=timm model.name=convnext_tiny data=imagenet"),
    (512, "experiment=quickstart recipe.global_batch_size=512"),
]  # fmt: skip


def config_of(*overrides: str) -> Any:
    return compose(["model=cifar_resnet20", "data=cifar10", *overrides]).config


def traced(rows: int, *overrides: str) -> Footprint:
    return trace_step(config_of(*overrides), CLASSES, rows)


def test_what_is_kept_is_weights_momentum_moving_average_and_buffers_to_the_byte() -> None:
    weights, running = 4 * 269_722, 4 * 2 * 688
    counters = 8 * 19
    plain = traced(4)
    assert plain.weights == plain.optimizer == weights
    assert running + counters <= plain.buffers <= running + counters + 4 * 6 + 64  # mean and std of the pixels besides
    averaged = traced(4, "recipe.ema_decay=0.9")
    assert averaged.moving_average == weights + running + counters + 8  # and how many steps it has followed
    assert averaged.kept - plain.kept == averaged.moving_average
    assert traced(4, "optimizer.momentum=0").optimizer == 0
    assert plain.timeline[0].phase == "kept"
    assert plain.timeline[0].nbytes == pytest.approx(plain.kept, rel=0.001)


def test_the_peak_grows_by_the_same_bytes_with_every_image_and_the_arithmetic_not_at_all() -> None:
    small, middle, large = (traced(rows) for rows in (16, 32, 48))
    assert large.peak - middle.peak == pytest.approx(middle.peak - small.peak, rel=0.001)
    assert small.flops_per_image == large.flops_per_image
    assert small.flops_per_image == pytest.approx(6 * 40.8e6, rel=0.02)  # He et al. count 40.8 M multiply-adds forward


def test_the_step_has_its_phases_in_order_and_ends_as_it_began() -> None:
    found = traced(16)
    phases = list(dict.fromkeys(moment.phase for moment in found.timeline))
    assert phases == ["kept", "forward", "backward", "optimizer"]
    assert found.timeline[-1].nbytes == pytest.approx(found.timeline[0].nbytes, rel=0.05)  # and the loss
    assert found.within_a_step > 16 * 32 * 32 * 16 * 4


def test_half_precision_and_mixing_are_traced_as_well() -> None:
    assert traced(64, "compute.precision=bf16").within_a_step < 0.8 * traced(64).within_a_step
    assert traced(8, "recipe.mixup=0.2", "recipe.cutmix=1.0").peak > 0


@pytest.mark.parametrize("limit", [0, 1037, 1038, 1040, 5000, 123_456, 10_000_000])
def test_the_largest_batch_fits_and_one_more_does_not(limit: int) -> None:
    asked = []

    def footprint_of(rows: int) -> Any:
        asked.append(rows)
        return SimpleNamespace(rows=rows, peak=1000 + 37 * rows + rows % 3)

    rows = largest_rows(limit, footprint_of)
    assert rows == 0 or footprint_of(rows).peak <= limit
    assert footprint_of(rows + 1).peak > limit
    assert len(asked) < 10


@pytest.mark.parametrize(("overrides", "processes", "rows"), [
    (("recipe.global_batch_size=256",), 8, 32), (("recipe.global_batch_size=100",), 8, 13),
    (("recipe.global_batch_size=256", "recipe.accumulate=4"), 8, 8),
    (("recipe.global_batch_size=256", "compute.virtual_ranks=16"), 4, 16),
])  # fmt: skip
def test_a_process_computes_its_part_of_a_slice_at_once(overrides: tuple[str, ...], processes: int, rows: int) -> None:
    assert rows_of(config_of(*overrides), processes) == rows


def test_hours_bytes_and_money_follow_from_the_set_and_the_speed() -> None:
    config = config_of("recipe.epochs=2", "recipe.global_batch_size=100", "cluster.prices=['cpu=0.5']",
                       "compute.num_nodes=2", "data.cache_gib=0.5", "checkpointing.every_epochs=1")  # fmt: skip
    train: Any = SimpleNamespace(shards=[SimpleNamespace(filesize=2**29)] * 4)
    plan: Any = SimpleNamespace(steps_per_epoch=36)
    needs = needs_of(config, 4, traced(4), train, plan, images_per_s=1.0)
    assert (needs.steps, needs.hours, needs.checkpoints) == (72, 2.0, 2)
    assert (needs.set_bytes, needs.node_bytes_per_epoch, needs.cached_share) == (2**31, 2**30, 0.25)
    assert needs.cost == {"cpu": 4.0}
    assert needs.petaflops == pytest.approx(7200 * needs.footprint.flops_per_image / 1e15)
    unknown = needs_of(config, 4, needs.footprint, None, None, None)
    assert (unknown.steps, unknown.hours, unknown.set_bytes, unknown.cost) == (None, None, None, {})


def test_plan_tells_and_draws_what_a_run_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "memory.svg"
    keys = ["model=cifar_resnet20", "data=cifar10", f"data_dir={tmp_path}", "recipe.global_batch_size=64"]
    assert main(["plan", "train", *keys, "--picture", str(picture), "--gib", "0.25"]) == 0
    told = capsys.readouterr()
    assert "the data is not known here, so neither are steps and hours" in told.err
    assert "64 images of 32 pixels in each process" in told.out
    assert "MiB a process at the peak (weights 1." in told.out
    assert "images at once in that memory" in told.out
    assert "<svg" in picture.read_text()
    assert main(["plan", "train", *keys, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (
        facts["memory_bytes"]["peak"] > facts["memory_bytes"]["weights"] > 4 * 269_722
    )  # 1,000 classes where they are not known
    assert facts["steps"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "overrides"), REAL, ids=lambda value: str(value))
def test_the_peak_is_within_a_tenth_of_a_real_steps(rows: int, overrides: str) -> None:
    command = [sys.executable, HERE / "real_step.py", str(rows), *overrides.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)["peak"]
    predicted = trace_step(compose(overrides.split()).config, 1000, rows).peak
    print(f"{rows} x {overrides}: {predicted / 2**20:.0f} of {measured / 2**20:.0f} MiB, {predicted / measured:.3f}")
    assert predicted == pytest.approx(measured, rel=0.1)
