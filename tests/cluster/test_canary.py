"""Three steps in a scratch folder tell what hours would have been lost to, and leave nothing where all is well."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from launching import Answer, Cli, Saboteur

from orchestrator.cluster.canary import Check, exit_code, other_world
from orchestrator.cluster.estimate import Timing, run_seconds
from orchestrator.compose import compose
from orchestrator.train.preflight import open_sets

NAMES = [
    "config and data", "runs_dir", "shared memory", "shards", "W&B", "train steps", "loader", "equal ranks", "memory",
    "validation", "checkpoint", "resume", "estimate",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(small: tuple[str, ...]) -> tuple[str, ...]:
    return (*small, "model=timm", "model.name=saboteur", "recipe.ema_decay=0.9", "--canary")


def kept_folders(cli: Cli) -> list[str]:
    return [path.name for path in (cli.cwd / "runs").glob(".canary-*")]


def require_failed(answer: Answer, code: int, name: str, *texts: str) -> None:
    assert answer.code == code, answer.err
    failed = json.loads(answer.out)[-1]
    assert (failed["name"], failed["state"], failed["exit_code"]) == (name, "fail", code), failed
    assert failed["seconds"] < 60
    for text in texts:
        assert text in failed["found"], failed["found"]
    assert f": {name}: " in answer.err


@pytest.mark.parametrize("extra", [(), ("compute.num_processes=1", "recipe.accumulate=2"), ("data.num_workers=1",)])
def test_a_run_that_is_well_passes_every_check_and_leaves_nothing(
    cli: Cli, run: tuple[str, ...], extra: tuple[str, ...]
) -> None:
    answer = cli("train", *run, *extra, "--json")
    assert answer.code == 0, answer.err
    checks = json.loads(answer.out)
    alone = "compute.num_processes=1" in extra
    assert [check["name"] for check in checks] == [name for name in NAMES if name != "equal ranks" or not alone]
    assert {check["state"] for check in checks} <= {"ok", "warn"}
    found = {check["name"]: check["found"] for check in checks}
    again = "1 of 1" if alone else "1 of 2"
    assert found["resume"] == f"step 3 again by {again} processes: the same bits"
    assert "the whole run takes about" in found["estimate"]
    assert list((cli.cwd / "runs").iterdir()) == []


def test_more_virtual_ranks_than_processes_are_tried_with_twice_as_many(cli: Cli, run: tuple[str, ...]) -> None:
    answer = cli("train", *run, "compute.num_processes=1", "compute.virtual_ranks=2", "--json")
    assert answer.code == 0, answer.err
    found = {check["name"]: check["found"] for check in json.loads(answer.out)}
    assert found["resume"] == "step 3 again by 2 of 1 processes: the same bits"


def test_a_canary_takes_less_than_40_seconds(cli: Cli, run: tuple[str, ...]) -> None:
    seconds = []
    for _ in range(2):  # the first may pay for the imports of a fresh server on a busy machine
        began = time.monotonic()
        assert cli("train", *run).code == 0
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 40


def test_plain_lines_tell_each_check_with_its_seconds(cli: Cli, run: tuple[str, ...]) -> None:
    answer = cli("train", *run)
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert [line[6:].split("  ")[0] for line in lines] == NAMES
    assert all(line.startswith(("ok  ", "warn")) for line in lines)
    assert "passed in" in answer.last_line()


class TestSeededFailures:
    """Each is named with its check, cause and way out."""

    @pytest.fixture
    def damaged(self, shards: Path, cli: Cli) -> Path:
        """A copy of the shards."""
        return Path(shutil.copytree(shards, cli.cwd / "copy"))

    def give(self, damaged: Path) -> tuple[str, str]:
        return f"data.train={damaged}/train", f"data.val={damaged}/val"

    def test_a_flipped_bit_in_the_first_shard(self, cli: Cli, run: tuple[str, ...], damaged: Path) -> None:
        first = sorted((damaged / "train").glob("*.tar"))[0]
        content = bytearray(first.read_bytes())
        content[700] ^= 1
        first.write_bytes(content)
        answer = cli("train", *run, *self.give(damaged), "--json")
        require_failed(answer, 42, "shards", first.name, "sha256", "Way out", "Kept: runs/.canary-")

    def test_a_cut_shard(self, cli: Cli, run: tuple[str, ...], damaged: Path) -> None:
        last = sorted((damaged / "train").glob("*.tar"))[-1]
        last.write_bytes(last.read_bytes()[:-512])
        answer = cli("train", *run, *self.give(damaged), "--json")
        require_failed(answer, 42, "config and data", last.name)
        assert kept_folders(cli) == []

    def test_a_head_that_is_too_small(self, cli: Cli, run: tuple[str, ...]) -> None:
        answer = cli("train", *run, "model.num_classes=2", "--json")
        require_failed(answer, 42, "config and data", "model.num_classes = 2", "Way out: model.num_classes=4")

    def test_a_folder_that_cannot_be_written(self, cli: Cli, run: tuple[str, ...]) -> None:
        (cli.cwd / "file").write_text("no folder")
        answer = cli("train", *run, "runs_dir=file/runs", "--json")
        require_failed(answer, 42, "runs_dir", "file/runs", "cannot be written", "Way out")

    def test_a_model_that_differs_between_ranks(self, cli: Cli, run: tuple[str, ...], saboteur: Saboteur) -> None:
        saboteur.arm("flip", 1, 2)
        answer = cli("train", *run, "--json")
        assert saboteur.fired
        require_failed(answer, 44, "train steps", "hold different weights at step 2", "head.weight", "Kept: ")
        assert len(kept_folders(cli)) == 1

    def test_a_model_that_keeps_what_no_checkpoint_holds(
        self, cli: Cli, run: tuple[str, ...], saboteur: Saboteur
    ) -> None:
        saboteur.arm("drift", 0, 0)
        answer = cli("train", *run, "--json")
        assert saboteur.fired
        require_failed(answer, 42, "resume", "step 3 again by 1 of 2 processes has other bits", "Way out")

    def test_a_loss_that_is_not_finite(self, cli: Cli, run: tuple[str, ...], saboteur: Saboteur) -> None:
        saboteur.arm("nan", 0, 0)
        answer = cli("train", *run, "--json")
        require_failed(answer, 42, "train steps", "recipe.on_nan = stop", "in step 1")

    @pytest.mark.parametrize(("what", "code"), [("raise", 1), ("SIGKILL", 137)])
    def test_a_rank_that_dies(self, cli: Cli, run: tuple[str, ...], saboteur: Saboteur, what: str, code: int) -> None:
        saboteur.arm(what, 1, 2)
        answer = cli("train", *run, "--json")
        assert saboteur.fired
        require_failed(answer, code, "train steps", "rank 1")


@pytest.mark.parametrize(
    ("virtual_ranks", "world_size", "places", "other"),
    [(None, 2, 8, 2), (2, 2, 8, 1), (8, 4, 4, 2), (2, 1, 2, 2), (2, 1, 1, 1), (1, 1, 8, 1), (8, 8, 8, 4)],
)
def test_the_other_number_of_processes_shares_the_slices(
    virtual_ranks: int | None, world_size: int, places: int, other: int
) -> None:
    assert other_world(virtual_ranks, world_size, places) == other


def test_the_estimate_adds_up_steps_evaluations_and_saves(small: tuple[str, ...]) -> None:
    config = compose([*small, "recipe.epochs=10", "checkpointing.every_epochs=2"]).config
    timing = Timing(2, 3, 4.0, 0.5, 0.1, 3.0, 12, 0.25, 1.0, None)
    parts = run_seconds(timing, config, open_sets(config))
    assert parts == {"start": 4.0, "steps": 70 * 0.5, "evaluation": 10 * 3.0 * 36 / 12, "checkpoints": 5 * 0.25}


def test_the_exit_code_is_that_of_the_check_that_failed() -> None:
    well = Check("a", "ok", "", 0.0)
    assert exit_code([well, Check("b", "warn", "", 0.0)]) == 0
    assert exit_code([well, Check("b", "fail", "", 0.0, 44)]) == 44
