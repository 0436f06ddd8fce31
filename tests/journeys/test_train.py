"""Training as it is typed: what a command prints, writes and leaves, from the config to a prediction."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from launching import REPO, Cli, Run, files_below, read_events

EXPERIMENTS = sorted(path.stem for path in (REPO / "conf" / "experiment").glob("*.yaml"))
SUBSTITUTES: dict[str, tuple[str, ...]] = {
    "quickstart": (),
    "cifar10_resnet20": ("data.image_size=8", "compute=cpu2"),
    "imagenet_resnet50": (
        "data.image_size=32", "data.eval_resize=32", "data.num_workers=1", "recipe.global_batch_size=8",
        "compute.device=cpu", "compute.deterministic=true",
    ),
}  # fmt: skip
"""What makes an experiment fit a machine without its data and GPUs; the rest of it stays."""


def test_cfg_prints_each_value_with_the_file_it_came_from(cli: Cli) -> None:
    shown = cli("train", "experiment=quickstart", "recipe.epochs=3", "--cfg")
    assert shown.code == 0
    rows = dict(re.findall(r"^( *\w+: \S+) +# (\S+)$", shown.out, re.MULTILINE))
    assert rows["  epochs: 3"] == "override"
    assert rows["  lr: 0.02"] == "conf/experiment/quickstart.yaml"
    assert rows["  image_size: 8"] == "conf/data/digits.yaml"
    assert rows["  stem: small"] == "conf/model/resnet18_small.yaml"
    assert rows["seed: 0"] == "conf/config.yaml"
    assert not list(cli.cwd.iterdir())


def test_a_dry_run_says_what_would_run_and_writes_nothing(cli: Cli, small: tuple[str, ...]) -> None:
    shown = cli("train", *small, "--dry-run", "--json")
    assert shown.code == 0, shown.err
    facts = shown.json()
    assert {key: facts[key] for key in ("processes", "train_samples", "val_samples", "classes", "state")} == {
        "processes": 2, "train_samples": 108, "val_samples": 36, "classes": 4, "state": "new"
    }  # fmt: skip
    assert (facts["steps_per_epoch"], facts["total_steps"], facts["global_batch_size"]) == (7, 14, 16)
    assert facts["command"] == f"torchrun --nproc-per-node 2 -m jobs.train runs/{facts['run_id']}/run.json"
    plain = cli("train", *small, "--dry-run")
    assert dict(re.split(r"\s+", line, maxsplit=1) for line in plain.out.splitlines()) == {
        key: str(value) for key, value in facts.items()
    }
    assert not list(cli.cwd.iterdir())


def test_the_result_is_the_whole_outcome_on_stdout_and_in_the_run_folder(trained: Run) -> None:
    result = trained.result
    assert json.loads((trained.folder / "result.json").read_text()) == result
    assert set(result) == {
        "schema", "run_id", "state", "exit_code", "attempts", "epoch", "step", "world_size", "metrics", "seconds",
        "weights_sha256", "state_sha256", "data_digest", "config_hash", "code_digest", "last", "best",
        "virtual_ranks",
    }  # fmt: skip
    expected = {"schema": 1, "state": "done", "exit_code": 0, "attempts": 1, "epoch": 2, "step": 14, "world_size": 2}
    assert {key: result[key] for key in expected} == expected
    accuracy = result["metrics"]["val/acc1"]
    assert accuracy["value"] == accuracy["hits"] / accuracy["count"]
    assert accuracy["count"] == 36
    assert result["last"].endswith("checkpoints/step_00000014")
    assert sum(result["seconds"].values()) > 0


def test_the_run_folder_holds_what_everything_else_reads(trained: Run) -> None:
    names = {path.name for path in trained.folder.iterdir()}
    assert {"run.json", "result.json", "evaluation.json", "events", "logs", "checkpoints", "report.html"} <= names
    logs = trained.folder / "logs" / "attempt_1"
    assert {path.name for path in logs.glob("*.log")} == {"rank_0.log", "rank_1.log"}
    bundle = json.loads((trained.folder / "run.json").read_text())
    assert (bundle["run_id"], bundle["schema"]) == (trained.folder.name, 1)
    assert bundle["data"]["train"]["digest"] == trained.result["data_digest"]
    assert re.fullmatch(r"[a-z0-9-]{1,31}-[0-9a-f]{8}", trained.folder.name)


def test_the_events_tell_the_run_step_by_step(trained: Run) -> None:
    events = read_events(trained.folder)
    assert [event["kind"] for event in events[:3]] == ["start", "first_step", "step"]
    assert [event["step"] for event in events if event["kind"] == "step"] == list(range(1, 15))
    assert [event["step"] for event in events if event["kind"] == "eval"] == [7, 14]
    assert [event["step"] for event in events if event["kind"] == "save"] == [7, 14]
    assert (events[-1]["kind"], events[-1]["exit_code"]) == ("end", 0)


def test_without_json_a_person_reads_accuracy_state_and_places(session_cli: Cli, small: Any, trained: Run) -> None:
    again = session_cli("train", *small, "recipe.ema_decay=0.9")
    assert again.code == 0
    assert "already finished" in again.err
    accuracy = trained.result["metrics"]["val/acc1"]
    assert f"{accuracy['value']:.2%} ({accuracy['hits']}/{accuracy['count']})" in again.out
    assert f"runs/{trained.folder.name}/report.html" in again.out
    assert trained.result["best"] in again.out


def test_what_was_trained_evaluates_and_predicts_with_the_names_of_its_classes(
    session_cli: Cli, trained: Run, shards: Path, tmp_path: Path
) -> None:
    run_id = trained.folder.name
    evaluated = session_cli("evaluate", f"checkpoint={run_id}:last", "--json")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json()["metrics"]["val/acc1"] == trained.result["metrics"]["val/acc1"]
    classes = json.loads((shards / "val" / "shards.json").read_text())["classes"]
    labels = unpack_images(shards / "val", tmp_path)
    predicted = session_cli("predict", f"checkpoint={run_id}:last", tmp_path, "--json")
    assert predicted.code == 0, predicted.err
    guesses = {Path(row["path"]).name: row["guesses"] for row in predicted.json()}
    assert guesses.keys() == labels.keys()
    for row in guesses.values():
        assert sorted(guess["class"] for guess in row) == sorted(classes)
        assert sum(guess["probability"] for guess in row) == pytest.approx(1, abs=1e-5)
        assert row == sorted(row, key=lambda guess: -guess["probability"])
    hits = sum(row[0]["class"] == classes[labels[name]] for name, row in guesses.items())
    assert hits == trained.result["metrics"]["val/acc1"]["hits"]
    table = session_cli("predict", f"checkpoint={run_id}:last", tmp_path / next(iter(guesses)), "--top", 2)
    assert table.code == 0
    assert [guess["class"] in table.out for guess in next(iter(guesses.values()))] == [True, True, False, False]


def unpack_images(folder: Path, out: Path) -> dict[str, int]:
    """Write the images of a shard set to a folder; the label of each file."""
    labels = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            content = {member.name: read_member(tar, member) for member in tar.getmembers()}
        for name, data in content.items():
            key, _, extension = name.rpartition(".")
            if extension != "cls":
                (out / f"{path.stem}-{key.replace('/', '-')}.{extension}").write_bytes(data)
                labels[f"{path.stem}-{key.replace('/', '-')}.{extension}"] = int(content[f"{key}.cls"])
    return labels


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return (tar.extractfile(member) or io.BytesIO()).read()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_a_step(cli: Cli, shards: Path, experiment: str) -> None:
    answer = cli(
        "train", f"experiment={experiment}", *SUBSTITUTES[experiment], f"data.train={shards}/train",
        f"data.val={shards}/val", "max_steps=1", "tracking=disabled", "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert (answer.json()["step"], answer.json()["state"]) == (1, "done")


def test_the_same_run_goes_on_from_another_run_folder_by_another_name_as_another_run(
    cli: Cli, small: tuple[str, ...], trained: Run
) -> None:
    """What may change between attempts does not change the id; what decides the numbers does."""

    def run_id(*more: str) -> str:
        return cli("train", *small, "recipe.ema_decay=0.9", *more, "--dry-run", "--json").json()["run_id"]

    same = ("compute.num_processes=1", "data.num_workers=2", "tracking=offline", "eval_batch_size=3", "runs_dir=a")
    assert {run_id(text) for text in same} == {trained.folder.name}
    others = ("seed=1", "recipe.epochs=3", "optimizer.lr=0.2", "name=other", "model.dropout=0.1")
    assert len({run_id(text) for text in others} | {trained.folder.name}) == len(others) + 1


def test_nothing_but_the_lock_changes_when_a_finished_run_is_started_again(
    session_cli: Cli, small: tuple[str, ...], trained: Run
) -> None:
    before = files_below(trained.folder)
    assert session_cli("train", *small, "recipe.ema_decay=0.9").code == 0
    after = files_below(trained.folder)
    assert {name for name in after if before.get(name) != after[name]} <= {"lock"}
