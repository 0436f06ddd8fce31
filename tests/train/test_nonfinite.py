"""A step that is not finite ends the run with its samples named, or is left out alike by every rank."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import SMALL, Answer, Cli, Saboteur, read_events
from PIL import Image

EPOCHS = 2
"""Of 24 images in 3 steps."""


@pytest.fixture(scope="module")
def whites(session_cli: Cli) -> Path:
    """Shards of 24 images of which one is white."""
    source, out = session_cli.cwd / "whites_source", session_cli.cwd / "whites"
    random = np.random.default_rng(0)
    for number in range(24):
        folder = source / f"class_{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 200, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels if number != 13 else np.full_like(pixels, 255)).save(folder / f"{number:02}.png")
    made = session_cli("shards", "make", source, out, "--samples-per-shard", 10, "--workers", 1, "--val-fraction", 0)
    assert made.code == 0, made.err
    return out


@pytest.fixture
def run(whites: Path) -> tuple[str, ...]:
    train = next(path for path in (whites / "train", whites) if (path / "shards.json").exists())
    return (
        *SMALL, f"data.train={train}", f"data.val={train}", "data.mean=[0,0,0]", "data.std=[1,1,1]",
        "recipe.global_batch_size=8", "model=timm", "model.name=saboteur", "recipe.ema_decay=0.9",
        "checkpointing.every_steps=1", "checkpointing.keep_last=9", "cluster.max_restarts=3", "--json",
    )  # fmt: skip


def run_folder(cli: Cli) -> Path:
    (folder,) = (cli.cwd / "runs").iterdir()
    return folder


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step_*"))


def require_done(answer: Answer) -> dict:
    assert answer.code == 0, answer.err
    return answer.json()


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_bad_step_ends_the_run_with_rank_samples_and_way_out_and_is_not_saved(
    cli: Cli, run: tuple[str, ...], saboteur: Saboteur, processes: int
) -> None:
    saboteur.arm("white", 0, 0)
    answer = cli("train", *run, f"compute.num_processes={processes}", "seed=3")
    assert saboteur.fired
    assert answer.code == 42, answer.err
    told = re.search(r"the loss of rank (\d) is not finite in step (\d); its (\d) samples", answer.last_line())
    assert told, answer.last_line()
    rank, step, count = map(int, told.groups())
    assert count == 8 // processes
    assert answer.last_line().startswith(f"error: rank {rank}: recipe.on_nan = stop: training diverged")
    assert re.search(r"train-00000\d.tar: \S*13.png", answer.last_line())
    assert all(way in answer.last_line() for way in ("optimizer.lr", "recipe.clip_norm=1", "recipe.on_nan=skip"))
    folder = run_folder(cli)
    assert step > 1
    assert saved_steps(folder) == list(range(1, step))
    listed = (folder / "nonfinite" / f"step_{step:08d}.txt").read_text().splitlines()
    assert len(listed) == count
    assert all(line.startswith(f"rank {rank}  train-") for line in listed)


def test_a_gradient_that_is_not_finite_is_found_though_each_loss_is(
    cli: Cli, run: tuple[str, ...], saboteur: Saboteur
) -> None:
    saboteur.arm("gradient", 1, 3)
    answer = cli("train", *run)
    assert saboteur.fired
    assert answer.code == 42, answer.err
    assert "the gradient is not finite in step 3, though each loss is; its 8 samples" in answer.last_line()
    assert saved_steps(run_folder(cli)) == [1, 2]


@pytest.mark.slow
def test_bad_steps_are_left_out_with_equal_bits_for_one_and_two_processes_and_over_a_resume(
    cli: Cli, run: tuple[str, ...], saboteur: Saboteur
) -> None:
    saboteur.arm("white", 0, 0)
    skip = (*run, "recipe.on_nan=skip", "compute.virtual_ranks=2")
    two = require_done(cli("train", *skip, "runs_dir=two"))
    one = require_done(cli("train", *skip, "runs_dir=one", "compute.num_processes=1"))
    folder = cli.cwd / "two" / two["run_id"]
    left_out = [event for event in read_events(folder) if event["kind"] == "left_out"]
    assert len(left_out) == EPOCHS
    assert all("13.png" in (folder / event["path"]).read_text() for event in left_out)
    last = [event for event in read_events(folder) if event["kind"] == "step"][-1]
    assert last["train/skipped_steps"] == EPOCHS
    assert np.isfinite(two["metrics"]["val/loss"])
    stopped = cli.cwd / "stopped" / two["run_id"]
    stopped.mkdir(parents=True)
    (stopped / "stop").write_text(str(left_out[0]["step"]))
    assert cli("train", *skip, "runs_dir=stopped").code == 45
    resumed = require_done(cli("train", *skip, "runs_dir=stopped", "compute.num_processes=1"))
    assert read_events(stopped)[-2]["kind"] == "trained"
    assert two["state_sha256"] == one["state_sha256"] == resumed["state_sha256"]
    saboteur.disarm()
    clean = require_done(cli("train", *skip, "runs_dir=clean"))
    assert clean["state_sha256"] != two["state_sha256"]
    same = require_done(cli("train", *run, "compute.virtual_ranks=2", "runs_dir=stop"))
    assert same["state_sha256"] == clean["state_sha256"]


@pytest.mark.slow
def test_a_run_that_ended_so_goes_on_where_it_was_once_it_may_leave_steps_out(
    cli: Cli, run: tuple[str, ...], saboteur: Saboteur
) -> None:
    saboteur.arm("white", 0, 0)
    assert cli("train", *run, "seed=3").code == 42
    last = saved_steps(run_folder(cli))[-1]
    resumed = cli("train", *run, "seed=3", "recipe.on_nan=skip")
    whole = require_done(cli("train", *run, "seed=3", "recipe.on_nan=skip", "runs_dir=whole"))
    assert f"resuming at step {last} of 6" in resumed.err
    assert require_done(resumed)["state_sha256"] == whole["state_sha256"]
    assert "left out by recipe.on_nan=skip: the loss of rank" in resumed.err


def test_a_step_that_is_left_out_changes_nothing_but_the_step(
    cli: Cli, run: tuple[str, ...], saboteur: Saboteur
) -> None:
    saboteur.arm("gradient", 1, 2)
    result = require_done(cli("train", *run, "recipe.on_nan=skip", "max_steps=2"))
    assert saboteur.fired
    assert result["step"] == 2
    first, second = (run_folder(cli) / "checkpoints" / f"step_0000000{n}" for n in (1, 2))
    for name in ("model.safetensors", "ema.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    moments = [
        torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]["state"] for folder in (first, second)
    ]
    assert len(moments[0]) > 3
    for one, other in zip(moments[0].values(), moments[1].values(), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])


def test_more_than_ten_in_a_row_end_the_run(cli: Cli, run: tuple[str, ...], saboteur: Saboteur) -> None:
    saboteur.arm("nan", 0, 0)
    answer = cli("train", *run, "recipe.on_nan=skip", "recipe.epochs=5")
    assert answer.code == 42, answer.err
    assert "in step 11 (11 steps in a row, at most 10 are left out)" in answer.last_line()
    assert "recipe.on_nan = skip: training diverged" in answer.last_line()
