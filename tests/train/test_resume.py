"""A run that was stopped, killed or broken ends with the bits and the history of one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import Answer, Cli, Run, Saboteur, finish, group_members, read_events, wait_for

HISTORY = ("train/loss", "train/acc1", "train/acc5", "lr", "val/loss", "val/acc1", "val/acc5", "epoch")
LAST_STEP = 14  # 2 epochs of 7
pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="session")
def overrides(small: tuple[str, ...]) -> tuple[str, ...]:
    """A run of the saboteur's model with momentum, average, dropout, and logs at other steps than saves."""
    return (
        *small, "model=timm", "model.name=saboteur", "recipe.ema_decay=0.9", "recipe.warmup_epochs=1",
        "optimizer.lr=0.5", "tracking.log_every_steps=3", "checkpointing.every_steps=5", "cluster.max_restarts=0",
    )  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(session_cli: Cli, overrides: tuple[str, ...]) -> Run:
    answer = session_cli("train", *overrides, "--json", "runs_dir=undisturbed")
    assert answer.code == 0, answer.err
    result = answer.json()
    assert result["step"] == LAST_STEP
    return Run(answer, session_cli.cwd / "undisturbed" / result["run_id"], result)


def history(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What was logged and evaluated at each step; a later attempt's word replaces an earlier one's."""
    return {
        (event["kind"], event["step"]): {key: event[key] for key in HISTORY if key in event}
        for event in read_events(folder)
        if event["kind"] in ("step", "eval")
    }


def require_equal_to(undisturbed: Run, answer: Answer, cli: Cli) -> None:
    assert answer.code == 0, answer.err
    result = answer.json()
    for key in ("run_id", "state", "state_sha256", "weights_sha256", "metrics", "step", "epoch"):
        assert result[key] == undisturbed.result[key], key
    assert history(cli.cwd / "runs" / result["run_id"]) == history(undisturbed.folder)


@pytest.mark.parametrize(
    "strike",
    [("SIGTERM", 1, 1, 143), ("SIGINT", 0, 4, 130), ("SIGTERM", 0, 7, 143), ("SIGINT", 1, 13, 130)],
    ids=["first-step", "mid-epoch", "last-step-of-an-epoch", "last-step-but-one"],
)
def test_a_signal_to_any_rank_stops_all_after_saving_and_the_same_command_ends_with_equal_bits(
    cli: Cli, overrides: tuple[str, ...], undisturbed: Run, saboteur: Saboteur, strike: tuple[str, int, int, int]
) -> None:
    what, rank, step, code = strike
    saboteur.arm(what, rank, step)
    stopped = cli("train", *overrides, "--json")
    assert saboteur.fired
    assert stopped.code == code, stopped.err
    result = stopped.json()
    assert (result["state"], result["exit_code"], result["step"]) == ("stopped", code, step)
    folder = cli.cwd / "runs" / result["run_id"]
    for number in (0, 1):
        last = read_events(folder, number)[-1]
        assert (last["kind"], last["step"], last["exit_code"]) == ("stop", step, code)
    resumed = cli("train", *overrides, "--json")
    assert f"resuming at step {step} of {LAST_STEP}" in resumed.err
    assert resumed.json()["attempts"] == 2
    require_equal_to(undisturbed, resumed, cli)


def test_another_seed_ends_with_other_bits(cli: Cli, overrides: tuple[str, ...], undisturbed: Run) -> None:
    other = cli("train", *overrides, "--json", "seed=1")
    assert other.code == 0
    assert other.json()["state_sha256"] != undisturbed.result["state_sha256"]
    assert other.json()["run_id"] != undisturbed.result["run_id"]


def test_a_stop_at_the_very_last_step_leaves_the_evaluation_to_the_next_command(
    cli: Cli, overrides: tuple[str, ...], undisturbed: Run, saboteur: Saboteur
) -> None:
    saboteur.arm("SIGTERM", 0, LAST_STEP)
    stopped = cli("train", *overrides, "--json")
    assert saboteur.fired
    assert stopped.code == 143, stopped.err
    assert (stopped.json()["step"], stopped.json()["metrics"]) == (LAST_STEP, {})
    require_equal_to(undisturbed, cli("train", *overrides, "--json"), cli)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_with_its_signal_and_the_run_goes_on_from_the_last_checkpoint(
    cli: Cli, overrides: tuple[str, ...], undisturbed: Run, saboteur: Saboteur, rank: int
) -> None:
    saboteur.arm("SIGKILL", rank, 9)
    began = time.monotonic()
    killed = cli("train", *overrides, "checkpointing.asynchronous=false", "--json")
    assert saboteur.fired
    assert killed.code == 128 + signal.SIGKILL
    assert killed.last_line() == f"error: rank {rank}: killed by SIGKILL"
    assert time.monotonic() - began < 60
    result = killed.json()
    assert (result["state"], result["exit_code"], result["rank"], result["step"]) == ("failed", 137, rank, 7)
    resumed = cli("train", *overrides, "--json")
    assert f"resuming at step 7 of {LAST_STEP}" in resumed.err
    require_equal_to(undisturbed, resumed, cli)


def test_an_exception_in_one_rank_is_shown_last_with_its_traceback_and_rank(
    cli: Cli, overrides: tuple[str, ...], saboteur: Saboteur
) -> None:
    saboteur.arm("raise", 1, 2)
    broken = cli("train", *overrides)
    assert saboteur.fired
    assert broken.code == 1
    assert broken.last_line() == "error: rank 1: ArithmeticError: the saboteur struck"
    assert broken.err.count("Traceback") == 1
    assert 'raise ArithmeticError("the saboteur struck")' in broken.err


def test_the_same_command_after_the_end_computes_nothing(
    session_cli: Cli, overrides: tuple[str, ...], undisturbed: Run
) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*")}
    again = session_cli("train", *overrides, "--json", "runs_dir=undisturbed")
    assert again.code == 0
    assert "already finished" in again.err
    assert again.json() == undisturbed.result
    after = {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*")}
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert changed <= {"lock"}


def test_another_world_size_goes_on_with_the_run(cli: Cli, overrides: tuple[str, ...], saboteur: Saboteur) -> None:
    saboteur.arm("SIGTERM", 0, 4)
    assert cli("train", *overrides).code == 143
    one = cli("train", *overrides, "compute.num_processes=1", "--json")
    assert one.code == 0, one.err
    assert (one.json()["step"], one.json()["world_size"], one.json()["attempts"]) == (LAST_STEP, 1, 2)


def test_damaged_newer_checkpoints_do_not_crowd_out_the_ones_that_a_resumed_run_writes(
    cli: Cli, overrides: tuple[str, ...], undisturbed: Run, saboteur: Saboteur
) -> None:
    keep = ("checkpointing.keep_last=1", "checkpointing.every_steps=1", "checkpointing.every_epochs=0")
    saboteur.arm("SIGTERM", 0, 7)
    assert cli("train", *overrides, "checkpointing.every_steps=4").code == 143
    (folder,) = (cli.cwd / "runs").iterdir()
    newest = folder / "checkpoints" / "step_00000007"
    os.truncate(newest / "model.safetensors", 100)
    resumed = cli("train", *overrides, *keep, "--json")
    assert f"{newest.relative_to(cli.cwd)}/model.safetensors has 100 of" in resumed.err
    assert f"resuming at step 4 of {LAST_STEP}" in resumed.err
    require_equal_to(undisturbed, resumed, cli)


class TestLauncher:
    """Processes of their own, because here the launcher itself is hit."""

    @pytest.fixture
    def process(self, cli: Cli, overrides: tuple[str, ...], saboteur: Saboteur) -> Iterator[subprocess.Popen[str]]:
        """A run that hangs in its fourth step, on rank 1; what is left of it ends with the test."""
        saboteur.arm("sleep", 1, 4)
        process = cli.start("train", *overrides, "--json")
        wait_for(lambda: saboteur.fired, "the run's fourth step", 100)
        yield process
        for pid in group_members(process.pid):
            os.kill(pid, signal.SIGKILL)

    @pytest.mark.slow
    def test_ctrl_c_saves_and_leaves_no_process_and_a_second_command_was_refused_meanwhile(
        self, cli: Cli, overrides: tuple[str, ...], undisturbed: Run, saboteur: Saboteur, process: subprocess.Popen[str]
    ) -> None:
        refused = cli("train", *overrides)
        assert refused.code == 42
        assert f"is already running as process {process.pid}" in refused.last_line()
        assert len(group_members(process.pid)) >= 4  # launcher, forkserver, two ranks
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        saboteur.disarm()
        began = time.monotonic()
        answer = finish(process)
        assert time.monotonic() - began < 20
        assert answer.code == 130, answer.err
        assert (answer.json()["state"], answer.json()["step"]) == ("stopped", 4)
        assert "Traceback" not in answer.err
        wait_for(lambda: not group_members(process.pid), "the end of every process of the run", 10)
        require_equal_to(undisturbed, cli("train", *overrides, "--json"), cli)

    def test_a_killed_launcher_takes_its_ranks_along_within_seconds(
        self, cli: Cli, overrides: tuple[str, ...], undisturbed: Run, saboteur: Saboteur, process: subprocess.Popen[str]
    ) -> None:
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: not group_members(process.pid), "the end of every rank", 10)
        finish(process)
        saboteur.disarm()
        require_equal_to(undisturbed, cli("train", *overrides, "--json"), cli)

    @pytest.mark.slow
    def test_torchrun_by_hand_with_overrides_gives_the_same_bits(
        self, cli: Cli, overrides: tuple[str, ...], undisturbed: Run
    ) -> None:
        torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "jobs.train")
        answer = cli.cold(*overrides, module=torchrun)
        assert answer.code == 0, answer.err
        shown = cli("train", *overrides, "--json")
        assert "already finished" in shown.err
        require_equal_to(undisturbed, shown, cli)

    @pytest.mark.slow
    def test_an_error_of_a_job_by_hand_is_told_on_the_terminal(
        self, cli: Cli, overrides: tuple[str, ...], saboteur: Saboteur
    ) -> None:
        saboteur.arm("raise", 0, 2)
        answer = cli.cold(*overrides, "compute.num_processes=1", module=("-m", "jobs.train"))
        assert saboteur.fired
        assert answer.code == 1
        assert answer.last_line() == "error: rank 0: ArithmeticError: the saboteur struck"
        assert answer.err.count("Traceback") == 1
