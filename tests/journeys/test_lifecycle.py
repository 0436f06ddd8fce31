"""Runs as they are followed, stopped, gone on with and removed from the command line, on this machine."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import Popen

import pytest
from launching import Cli, Saboteur, finish, wait_for

from orchestrator.bundle import load_bundle, with_config, write_bundle
from orchestrator.cluster.lock import holder
from orchestrator.options import Where

Slow = tuple[str, ...]


@pytest.fixture(scope="module")
def slow(small: Slow) -> Slow:
    """A run that would go on for minutes."""
    return (*small, "recipe.epochs=3000", "checkpointing.every_epochs=0", "checkpointing.every_steps=5")


def reached(folder: Path, step: int) -> bool:
    path = folder / "events" / "rank_0.jsonl"
    return path.exists() and any(
        json.loads(line).get("step", 0) >= step for line in path.read_text().splitlines() if line.endswith("}")
    )


def only_run(cli: Cli) -> Path:
    return wait_for(lambda: next((cli.cwd / "runs").glob("*/run.json"), None), "a run's folder").parent


@contextmanager
def running(cli: Cli, *arguments: object) -> Iterator[tuple[Popen[str], Path]]:
    """A run that trains in a process of its own."""
    process = cli.start("train", *arguments)
    try:
        folder = only_run(cli)
        wait_for(lambda: reached(folder, 3), "three steps")
        yield process, folder
    finally:
        process.kill()
        process.communicate()


def test_a_run_is_followed_looked_into_cancelled_and_gone_on_with(cli: Cli, slow: Slow) -> None:
    with running(cli, *slow) as (process, folder):
        follower = cli.start("logs", folder.name[:12], "-f")
        stacks = cli("stack", folder.name, "--json")
        assert stacks.code == 0, stacks.err
        assert set(stacks.json()) == {"0", "1"}
        assert any("/orchestrator/" in frame for frames in stacks.json().values() for frame in frames)
        plain = cli("stack", folder.name)
        assert "rank 1, innermost call first" in plain.out
        assert cli("status", folder.name, "--json").json()["where"] == [f"process {process.pid}"]
        refused = cli("rm", folder.name, "--yes")
        assert (refused.code, f"orchestrator cancel {folder.name}" in refused.err) == (42, True)
        again = cli("resume", folder.name)
        assert (again.code, f"running as process {process.pid}" in again.err) == (42, True)
        asked = cli("cancel", folder.name[:12])
        assert asked.code == 0, asked.err
        assert f"orchestrator resume {folder.name}" in asked.out
        assert finish(process).code == 143
        followed = finish(follower)
    assert followed.code == 0
    assert {line.split("]")[0] for line in followed.out.splitlines()} == {"[a1 r0", "[a1 r1", "[a1"}
    assert followed.out.splitlines()[-1] == "[a1] the run ended with 143: stopped by SIGTERM after saving"
    stopped = json.loads((folder / "result.json").read_text())
    assert (stopped["state"], stopped["step"] > 0) == ("stopped", True)


@pytest.mark.slow
def test_a_cancelled_run_resumes_from_its_own_config_and_ends_like_the_undisturbed_one(
    cli: Cli, small: Slow, saboteur: Saboteur
) -> None:
    plain = (*small, "model=timm", "model.name=saboteur")
    undisturbed = cli("train", *plain, "--json")
    assert undisturbed.code == 0, undisturbed.err
    folder = only_run(cli)
    moved = folder.rename(cli.cwd / "kept")
    saboteur.arm("sleep", rank=0, batch=5)
    process = cli.start("train", *plain)
    wait_for(lambda: saboteur.fired, "the fifth batch")
    assert cli("cancel", folder.name).code == 0
    saboteur.disarm()
    assert finish(process).code == 143
    assert "no rank 7 has printed anything" in cli("logs", folder.name, "--rank", 7).err
    logs = cli("logs", folder.name, "--rank", 1, "--json")
    lines = [json.loads(line) for line in logs.out.splitlines()]
    assert {(line["attempt"], line["rank"]) for line in lines} == {(1, 1)}
    elsewhere = cli.cwd / "elsewhere"
    elsewhere.mkdir()
    folder.rename(elsewhere / folder.name)
    resumed = cli("resume", folder.name, "--runs-dir", elsewhere, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json()["weights_sha256"] == undisturbed.json()["weights_sha256"]
    assert (resumed.json()["attempts"], moved.exists()) == (2, True)
    assert not (cli.cwd / "runs" / folder.name).exists()


@pytest.mark.slow
def test_cancel_now_kills_and_the_run_still_goes_on_from_its_checkpoint(cli: Cli, slow: Slow) -> None:
    with running(cli, *slow) as (process, folder):
        wait_for(lambda: list(folder.glob("checkpoints/step_*")), "a checkpoint")
        answer = cli("cancel", folder.name, "--now", "--json")
        assert answer.json() == {"run_id": folder.name, "asked": "end"}
        assert finish(process).code == -signal.SIGKILL
        wait_for(lambda: holder(folder) is None, "the lock to be free")
    again = cli("cancel", folder.name)
    assert again.code == 42
    assert f"run {folder.name} is not running here (dead)" in again.err
    assert "orchestrator status" in again.err


@pytest.mark.slow
def test_following_goes_on_across_a_restart_and_ends_with_the_run(cli: Cli, small: Slow, saboteur: Saboteur) -> None:
    plain = (*small, "model=timm", "model.name=saboteur", "cluster.backoff_s=0")
    saboteur.arm("SIGKILL", rank=1, batch=9)
    process = cli.start("train", *plain)
    folder = only_run(cli)
    follower = cli.start("logs", folder.name, "-f", "--json")
    assert finish(process).code == 0
    seen = [json.loads(line) for line in finish(follower).out.splitlines()]
    assert seen == [json.loads(line) for line in cli("logs", folder.name, "--json").out.splitlines()]
    keys = [(line["attempt"], line["rank"], line["number"]) for line in seen]
    assert len(keys) == len(set(keys))
    launcher = [(line["attempt"], line["text"].partition(",")[0]) for line in seen if line["rank"] is None]
    assert launcher == [(1, "rank 1: killed by SIGKILL"), (2, "the run ended with 0: done")]


@pytest.mark.slow
def test_who_follows_may_leave_and_the_run_goes_on(cli: Cli, slow: Slow) -> None:
    with running(cli, *slow) as (process, folder):
        follower = cli.start("logs", folder.name, "-f")
        time.sleep(1.5)
        follower.send_signal(signal.SIGINT)
        left = finish(follower)
        assert left.code == 130
        assert left.last_line() == f"no longer followed; run {folder.name} goes on"
        assert process.poll() is None


def test_a_finished_run_is_not_started_again_and_is_removed_with_its_checkpoints_only_when_told(
    cli: Cli, small: Slow
) -> None:
    assert cli("train", *small).code == 0
    folder = only_run(cli)
    again = cli("resume", folder.name)
    assert (again.code, "already finished" in again.err) == (0, True)
    pulled = cli("pull", folder.name)
    assert (pulled.code, f"run {folder.name} is on this machine" in pulled.err) == (42, True)
    careful = cli("rm", folder.name, "cluster=local")
    assert careful.code == 42
    assert "has 2 checkpoints, the last step_00000014" in careful.err
    assert f"orchestrator rm {folder.name} --yes" in careful.err
    removed = cli("rm", folder.name, "--yes", "--json")
    assert removed.json() == {"run_id": folder.name, "removed": True}
    assert not folder.exists()


def test_a_copy_of_a_cluster_s_run_is_resumed_there(cli: Cli, small: Slow) -> None:
    assert cli("train", *small, "max_steps=1").code == 0
    folder = only_run(cli)
    bundle = load_bundle(folder / "run.json")
    config = replace(bundle.config, cluster=replace(bundle.config.cluster, where=Where.ray))
    write_bundle(with_config(bundle, config), folder / "run.json", {})
    refused = cli("resume", folder.name)
    assert refused.code == 42
    assert f"Way out: orchestrator resume {folder.name} cluster=ray" in refused.err


@pytest.mark.parametrize("verb", ["status", "why", "snapshot", "logs", "cancel", "resume", "pull", "stack", "rm"])
def test_every_verb_takes_the_beginning_of_an_id_and_names_what_is_near(cli: Cli, verb: str) -> None:
    for name in ("small-0123abcd", "small-0123ffff", "other-00000000"):
        (cli.cwd / "runs" / name).mkdir(parents=True)
        (cli.cwd / "runs" / name / "run.json").write_text("{}")
    several = cli(verb, "small-0123")
    assert several.code == 42
    assert "is the beginning of 2 runs: small-0123" in several.err
    unknown = cli(verb, "othr-0000")
    assert unknown.code == 42
    assert "did you mean 'other-00000000'?" in unknown.err
    help = cli(verb, "--help").out
    assert help.count(f"  orchestrator {verb}") >= 2
    assert "--json" in help


def test_what_is_no_key_of_the_cluster_is_refused(cli: Cli) -> None:
    refused = cli("logs", "x", "recipe.epochs=3")
    assert refused.code == 42
    assert "recipe.epochs = 3: is no key of the cluster, and logs needs no other" in refused.err
    misspelt = cli("ls", "cluster=kubernetis")
    assert (misspelt.code, "did you mean 'kubernetes'?" in misspelt.err) == (42, True)
