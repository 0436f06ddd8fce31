"""Runs of a store as the command line reads them, with no cluster at hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from launching import Cli, Run

from orchestrator.cluster.stored_runs import plain_names
from orchestrator.compose import compose
from orchestrator.train.loading import open_source

CHECKPOINT = re.compile(r"step_\d{8}")


@pytest.fixture
def url(tmp_path: Path, trained: Run) -> str:
    """A store with the trained run, as its nodes would have left it there."""
    kept = tmp_path / "store" / trained.folder.name
    shutil.copytree(trained.folder, kept)
    (kept / "record.json").write_text('{"schema": 1, "generation": 2, "attempt": 1}\n')
    for folder in list((kept / "checkpoints").glob("step_*")):
        folder.rename(folder.with_name(f"{folder.name}.g0002"))
    (tmp_path / "store" / "shards" / "train").mkdir(parents=True)
    (tmp_path / "store" / "shards" / "train" / "x.tar").write_bytes(b"no run at all")
    sent = json.loads((kept / "run.json").read_text())
    sent["config"]["runs_dir"] = f"file://{tmp_path}/store"
    sent["config"]["compute"]["num_nodes"] = 2
    sent["config"]["cluster"] |= {"where": "kubernetes", "image": "registry/image:tag", "store_secret": "store/keys"}
    (kept / "run.json").write_text(json.dumps(sent))
    torn = kept / "checkpoints" / "step_00000003.g0001"
    shutil.copytree(kept / "checkpoints" / "step_00000014.g0002", torn)
    (torn / "model.safetensors").unlink()
    half = kept / "checkpoints" / "step_00000014.g0003"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"of a start that was killed")
    return f"file://{tmp_path}/store"


def test_a_run_is_listed_looked_at_and_read_from_its_store(cli: Cli, url: str, trained: Run) -> None:
    run_id = trained.result["run_id"]
    (listed,) = cli("ls", "--runs-dir", url, "--json").json()
    assert (listed["run_id"], listed["state"], listed["step"]) == (run_id, "done", 14)
    here = cli("status", trained.folder, "--json").json()
    there = cli("status", run_id[:-2], f"runs_dir={url}", "--json").json()
    for key in ("state", "exit_code", "step", "top1", "goodput", "wall_s", "seconds", "process_hours", "attempt"):
        assert there[key] == here[key], key
    assert there["folder"] == f"{url}/{run_id}"
    assert f"{url}/{run_id}/checkpoints/step_00000014" in cli("status", run_id, "--runs-dir", url).out
    lines = [cli("logs", *where, "--json").out for where in ((run_id, "--runs-dir", url), (trained.folder,))]
    assert lines[0] == lines[1] != ""
    assert [path.name for path in cli.cwd.iterdir()] == ["store"], "nothing else is left here"


def test_it_comes_here_once_with_its_checkpoints_where_they_are_asked_for(cli: Cli, url: str, trained: Run) -> None:
    run_id = trained.result["run_id"]
    assert cli("pull", run_id, "--runs-dir", url).code == 0
    here = cli.cwd / "runs" / run_id
    assert not (here / "checkpoints").exists()
    (here / "report.html").write_text("another")
    (here / "result.json").touch()
    times = {path: path.stat().st_mtime_ns for path in here.rglob("*.json*")}
    pulled = cli("pull", run_id, "--runs-dir", url, "--checkpoints", "--to", cli.cwd / "runs")
    assert pulled.code == 0, pulled.err
    for path in trained.folder.rglob("*"):
        if path.is_file() and path.name not in ("lock", "run.json") and ".attempt" not in str(path):
            assert (here / path.relative_to(trained.folder)).read_bytes() == path.read_bytes(), path
    assert "step_00000003/manifest.json is of step 14" in pulled.err
    assert not (here / "checkpoints" / "step_00000003").exists()
    same = [path for path in times if path.name != ".store.json"]
    assert {path: path.stat().st_mtime_ns for path in same} == {path: times[path] for path in same}, "what was here"
    source = open_source(here / "checkpoints" / "step_00000014", compose([]))
    assert (source.config.runs_dir, source.config.cluster.store_secret) == ("runs", None), (
        "secrets of pods are not here"
    )
    evaluated = cli("evaluate", f"checkpoint={run_id}:last", "--json")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json()["metrics"]["val/acc1"] == trained.result["metrics"]["val/acc1"]


def test_what_only_a_cluster_can_do_names_the_cluster(cli: Cli, url: str, trained: Run) -> None:
    run_id = trained.result["run_id"]
    for verb in (("cancel",), ("resume",), ("stack",), ("rm",), ("logs", "-f")):
        refused = cli(*verb, run_id, "--runs-dir", url)
        assert refused.code == 42
        assert refused.last_line().endswith(f"Way out: orchestrator {' '.join(verb)} {run_id} cluster=kubernetes")


def test_a_run_that_may_still_be_trained_is_said_to_run_by_its_record(cli: Cli, url: str, trained: Run) -> None:
    path = Path(url.removeprefix("file://"), trained.result["run_id"], "result.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "running"}))
    answer = cli("status", trained.result["run_id"], "--runs-dir", url)
    assert "state          running" in answer.out
    assert "says its record, which was written" in answer.out


@pytest.mark.parametrize("verb", ["status", "pull", "logs"])
def test_another_id_or_store_is_named(cli: Cli, url: str, verb: str) -> None:
    unknown = cli(verb, "nothing-like-it", "--runs-dir", url)
    assert unknown.code == 42
    assert "nothing-like-it is no run in --runs-dir" in unknown.err
    wrong = cli(verb, "x", "--runs-dir", "ftp://host/runs")
    assert wrong.code == 42
    assert "ftp" in wrong.err


def test_training_here_into_a_store_is_refused_before_anything_is_written(cli: Cli, small: tuple[str, ...]) -> None:
    for command in (("train", *small), ("train", *small, "--dry-run"), ("train", *small, "--canary")):
        refused = cli(*command, "runs_dir=s3://bucket/runs")
        assert refused.code == 42
        assert "runs_dir = s3://bucket/runs: is an object store" in refused.err
        assert "Way out: runs_dir=PATH checkpointing.mirror=s3://bucket/runs" in refused.err
    assert list(cli.cwd.iterdir()) == []


def test_of_a_checkpoint_s_generations_the_last_whole_one_counts() -> None:
    keys = dict.fromkeys(
        ["record.json", "run.json", "checkpoints/latest.json", "checkpoints/step_00000001.g0001/manifest.json",
         "checkpoints/step_00000001.g0001/a", "checkpoints/step_00000001.g0002/manifest.json",
         "checkpoints/step_00000001.g0002/a", "checkpoints/step_00000001.g0003/a"]
    )  # fmt: skip
    assert plain_names(keys) == {
        "run.json": "run.json",
        "checkpoints/step_00000001.g0002/manifest.json": "checkpoints/step_00000001/manifest.json",
        "checkpoints/step_00000001.g0002/a": "checkpoints/step_00000001/a",
    }
