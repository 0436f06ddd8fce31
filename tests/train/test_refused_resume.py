"""A run goes on only from what it began with: anything else is refused by name, with the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launching import Answer, Cli, Saboteur

from orchestrator.train.checkpoint import hash_manifest

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def command(small: tuple[str, ...]) -> tuple[str, ...]:
    return ("train", *small, "model=timm", "model.name=saboteur")


@pytest.fixture
def stopped(cli: Cli, command: tuple[str, ...], saboteur: Saboteur) -> Path:
    """The folder of a run that was stopped after its fourth step."""
    saboteur.arm("SIGTERM", 0, 4)
    assert cli(*command).code == 143
    (folder,) = (cli.cwd / "runs").iterdir()
    return folder


def require_refused(answer: Answer, *parts: str) -> None:
    assert answer.code == 42, answer.err
    assert "Traceback" not in answer.err
    for part in (*parts, "Way out"):
        assert part in answer.last_line()


def test_checkpoints_of_a_run_with_other_values_are_refused_with_the_values(
    cli: Cli, command: tuple[str, ...], stopped: Path
) -> None:
    facts = cli(*command, "recipe.epochs=3", "--dry-run", "--json").json()
    shutil.copytree(stopped / "checkpoints", cli.cwd / facts["folder"] / "checkpoints")
    answer = cli(*command, "recipe.epochs=3")
    require_refused(answer, "step_00000004 is not of this run: it ends after 21 steps, there 14", "init_from=")
    assert f"{stopped.name} has another recipe.epochs = 3 (there 2)" in answer.err


@pytest.mark.slow
def test_checkpoints_of_another_seed_are_refused_by_the_run_they_are_of(
    cli: Cli, command: tuple[str, ...], stopped: Path
) -> None:
    facts = cli(*command, "seed=5", "--dry-run", "--json").json()
    shutil.copytree(stopped / "checkpoints", cli.cwd / facts["folder"] / "checkpoints")
    require_refused(cli(*command, "seed=5"), f"its id is {facts['run_id']}, there {stopped.name}")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data_digest": "0" * 64}, "was trained on other shards than"),
        ({"model": {"name": "resnet18"}}, "model.name = saboteur, there resnet18"),
    ],
)
def test_a_checkpoint_of_other_shards_or_of_another_model_is_refused(
    cli: Cli, command: tuple[str, ...], stopped: Path, change: dict[str, object], told: str
) -> None:
    path = stopped / "checkpoints" / "step_00000004" / "manifest.json"
    content = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({**content, "manifest_sha256": hash_manifest(content)}))
    require_refused(cli(*command), told)


def test_a_bundle_that_was_edited_by_hand_is_refused(cli: Cli, stopped: Path) -> None:
    path = stopped / "run.json"
    content = json.loads(path.read_text())
    content["config"]["recipe"]["epochs"] = 3
    path.write_text(json.dumps(content))
    answer = cli.cold(path, module=("-m", "jobs.train"))
    require_refused(answer, "run.json was edited")


@pytest.mark.slow
def test_keys_that_may_change_do_not_end_a_run(cli: Cli, command: tuple[str, ...], stopped: Path) -> None:
    answer = cli(
        *command, "compute.num_processes=1", "data.num_workers=2", "checkpointing.keep_last=1",
        "checkpointing.every_steps=1", "checkpointing.keep_best=0", "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "resuming at step 4 of 14" in answer.err
    assert answer.json()["run_id"] == stopped.name
    assert [path.name for path in (stopped / "checkpoints").glob("step_*")] == ["step_00000014"]


@pytest.mark.slow
def test_a_last_save_that_did_not_reach_the_mirror_ends_with_75_and_is_brought_there_later(
    cli: Cli, command: tuple[str, ...], stopped: Path, saboteur: Saboteur, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ENDPOINT_URL", "http://127.0.0.1:1"), ("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s")):
        monkeypatch.setenv(f"AWS_{name}", value)
    saboteur.arm("SIGTERM", 0, 4)
    dead = ("checkpointing.mirror=s3://runs/a", "cluster.grace_s=20", "cluster.max_restarts=0")
    answer = cli.cold(*command, *dead)
    assert saboteur.fired
    assert answer.code == 75, answer.err
    assert "the run goes on without its mirror until it answers" in answer.err
    assert "the last checkpoint is on this machine only" in answer.last_line()
    assert (stopped / "checkpoints" / "step_00000008" / "manifest.json").exists()
    later = cli(*command, f"checkpointing.mirror=file://{cli.cwd}/store", "--json")
    assert later.code == 0, later.err
    assert "resuming at step 8 of 14" in later.err
    assert sorted(path.name for path in (cli.cwd / "store" / stopped.name).iterdir())[-1] == "step_00000014.g0001"
