"""Runs end with the same bits for any number of processes that share the virtual ranks, changed on the way or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import Cli, Saboteur, read_events
from test_resume import history

pytestmark = pytest.mark.timeout(300)
EQUAL = ("state_sha256", "weights_sha256", "metrics", "step", "virtual_ranks")
LAST_STEP = 9
"""3 epochs of 108 images in steps of 36."""


@pytest.fixture(scope="session")
def elaborate(small: tuple[str, ...]) -> tuple[str, ...]:
    """Everything that has a memory: statistics, dropout, an average, mixed images, parts, clipping, momentum."""
    return (
        *small, "model=timm", "model.name=saboteur", "recipe.global_batch_size=36", "recipe.epochs=3",
        "recipe.accumulate=2", "recipe.mixup=0.2", "recipe.cutmix=1.0", "recipe.erase=0.2", "recipe.ema_decay=0.9",
        "recipe.clip_norm=1.0", "recipe.label_smoothing=0.1", "optimizer.lr=0.5", "checkpointing.every_steps=2",
        "tracking.log_every_steps=2",
    )  # fmt: skip


def train(cli: Cli, overrides: tuple[str, ...], world: int, *more: str) -> tuple[dict[str, Any], Path]:
    answer = cli("train", *overrides, f"compute.num_processes={world}", "--json", f"runs_dir=world{world}", *more)
    assert answer.code == 0, answer.err
    result = answer.json()
    return result, next((cli.cwd / f"world{world}").glob("*/result.json")).parent


def require_equal(cli: Cli, overrides: tuple[str, ...], worlds: list[int]) -> dict[str, Any]:
    runs = [train(cli, overrides, world) for world in worlds]
    for world, (result, folder) in zip(worlds, runs, strict=True):
        assert result["world_size"] == world
        assert {key: result[key] for key in EQUAL} == {key: runs[0][0][key] for key in EQUAL}
        assert history(folder) == history(runs[0][1])
    return runs[0][0]


def test_one_two_and_four_processes_end_with_the_same_bits_and_history(cli: Cli, elaborate: tuple[str, ...]) -> None:
    result = require_equal(cli, (*elaborate, "compute.virtual_ranks=4", "max_steps=4"), [1, 2, 4])
    assert result["virtual_ranks"] == 4


@pytest.mark.slow
def test_two_processes_by_default_have_the_bits_of_plain_ddp_and_one_and_two_without_virtual_ranks_have_not(
    cli: Cli, elaborate: tuple[str, ...]
) -> None:
    short = (*elaborate, "max_steps=3")
    by_default, _ = train(cli, short, 2)
    plain, _ = train(cli, (*short, "compute.virtual_ranks=off", "name=plain"), 2)
    alone, _ = train(cli, (*short, "compute.virtual_ranks=off", "name=plain"), 1)
    assert (by_default["virtual_ranks"], plain["virtual_ranks"]) == (2, None)
    assert by_default["state_sha256"] == plain["state_sha256"]
    assert alone["state_sha256"] != plain["state_sha256"]  # the control
    assert alone["metrics"]["val/loss"] == pytest.approx(plain["metrics"]["val/loss"], rel=0.1)


@pytest.mark.slow
def test_a_run_that_loses_a_process_before_its_first_save_keeps_its_virtual_ranks(
    cli: Cli, elaborate: tuple[str, ...], saboteur: Saboteur
) -> None:
    short = (*elaborate, "max_steps=3", "checkpointing.every_steps=0", "cluster.max_restarts=0")
    undisturbed, _ = train(cli, short, 2, "name=undisturbed")
    saboteur.arm("SIGKILL", 1, 2)
    killed = cli("train", *short, "compute.num_processes=2", "runs_dir=world1")
    assert saboteur.fired
    assert killed.code == 137
    resumed, folder = train(cli, short, 1)
    assert (resumed["attempts"], resumed["virtual_ranks"], resumed["world_size"]) == (2, 2, 1)
    assert resumed["state_sha256"] == undisturbed["state_sha256"]
    assert [event["virtual_ranks"] for event in read_events(folder) if event["kind"] == "start"] == [2, 2]


@pytest.mark.slow
def test_more_processes_than_the_first_attempt_had_go_on_with_a_notice_and_the_run_stays_plain(
    cli: Cli, elaborate: tuple[str, ...], saboteur: Saboteur
) -> None:
    saboteur.arm("SIGTERM", 0, 3)
    one = cli("train", *elaborate, "compute.num_processes=1", "max_steps=4")
    assert one.code == 143
    saboteur.arm("SIGTERM", 0, 3)
    two = cli("train", *elaborate, "compute.num_processes=2", "max_steps=4")
    assert two.code == 143
    assert "2 processes cannot share the 1 slices" in two.err
    end = cli("train", *elaborate, "compute.num_processes=1", "max_steps=4", "--json")
    assert (end.code, end.json()["virtual_ranks"], end.json()["step"]) == (0, None, 4)
    (folder,) = (cli.cwd / "runs").iterdir()
    assert json.loads((folder / "virtual_ranks.json").read_text())["virtual_ranks"] is None


@pytest.mark.parametrize(("processes", "virtual"), [("3", "4"), ("8", "4"), ("5:7", "8")])
def test_processes_that_cannot_share_the_virtual_ranks_are_refused_before_anything_starts(
    cli: Cli, small: tuple[str, ...], processes: str, virtual: str
) -> None:
    refused = cli("train", *small, f"compute.num_processes={processes}", f"compute.virtual_ranks={virtual}")
    assert refused.code == 42
    assert refused.last_line().startswith(
        f"error: compute.virtual_ranks = {virtual}: cuts a step into {virtual} slices"
    )
    assert "compute.num_processes=1, 2" in refused.last_line()
    assert not (cli.cwd / "runs").exists()


@pytest.mark.slow
def test_eight_processes_then_four_two_one_and_eight_end_like_any_undisturbed_number(
    cli: Cli, elaborate: tuple[str, ...], saboteur: Saboteur
) -> None:
    eight = (*elaborate, "compute.virtual_ranks=8", "cluster.backoff_s=0")
    undisturbed = require_equal(cli, eight, [1, 2, 4, 8])
    # The batch at which a rank is struck lies within a step, often within a slice.
    legs = [
        (8, "SIGTERM", 5, 4),
        (4, "SIGKILL", 3, 3),
        (4, "SIGTERM", 0, 5),
        (2, "SIGTERM", 1, 11),
        (1, "SIGTERM", 0, 7),
    ]
    for world, what, rank, batch in legs:
        saboteur.arm(what, rank, batch)
        code = cli("train", *eight, f"compute.num_processes={world}", "cluster.max_restarts=0").code
        assert saboteur.fired
        assert code == (143 if what == "SIGTERM" else 137), (world, what)
    end = cli("train", *eight, "compute.num_processes=8", "--json")
    assert end.code == 0, end.err
    result = end.json()
    assert (result["attempts"], result["world_size"], result["step"]) == (len(legs) + 1, 8, LAST_STEP)
    assert {key: result[key] for key in EQUAL} == {key: undisturbed[key] for key in EQUAL}
    assert history(cli.cwd / "runs" / result["run_id"]) == history(next((cli.cwd / "world1").iterdir()))


@pytest.mark.slow
def test_without_virtual_ranks_two_three_and_one_processes_see_the_same_samples_and_end_close(
    cli: Cli, elaborate: tuple[str, ...], saboteur: Saboteur
) -> None:
    plain = (*elaborate, "compute.virtual_ranks=off", "optimizer.lr=0.05", "recipe.mix_probability=0.0")
    undisturbed, _ = train(cli, plain, 2)
    for world, batch in ((2, 4), (3, 5)):
        saboteur.arm("SIGTERM", 1, batch)
        assert cli("train", *plain, f"compute.num_processes={world}").code == 143
    end = cli("train", *plain, "compute.num_processes=1", "--json")
    assert end.code == 0, end.err
    result = end.json()
    assert (result["world_size"], result["step"], result["virtual_ranks"]) == (1, LAST_STEP, None)
    images = [
        event["train/images"] for event in read_events(cli.cwd / "runs" / result["run_id"]) if event["kind"] == "step"
    ]
    assert sum(images) == 3 * 108
    assert result["metrics"]["val/loss"] == pytest.approx(undisturbed["metrics"]["val/loss"], rel=0.05)


@pytest.mark.slow
def test_a_range_of_processes_is_used_up_to_the_largest_that_shares_the_virtual_ranks(
    cli: Cli, elaborate: tuple[str, ...]
) -> None:
    short = (*elaborate, "compute.virtual_ranks=4", "max_steps=2", "compute.num_processes=1:3", "--json")
    result = cli("train", *short).json()
    assert (result["world_size"], result["virtual_ranks"]) == (2, 4)
