"""Real runs: the split of their time sums to the wall time, and finds a delay where it was put."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from launching import Cli, Run, Saboteur, environment

from orchestrator.track.goodput import count_work, measure, rank_split, stragglers
from orchestrator.track.runs import load_run
from orchestrator.track.timeline import Timeline, read_timeline
from orchestrator.train.ledger import PhaseClock

STEPS = 21
DELAY_S = 0.25
pytestmark = pytest.mark.timeout(200)


def timeline_of(folder: Path) -> Timeline:
    record = load_run(folder)
    return read_timeline(record.ranks, record.launcher)


def delayed_run(folder: Path, overrides: tuple[str, ...], loader: float, step: list[float]) -> Timeline:
    (folder / "delays.json").write_text(json.dumps({"loader": loader, "step": step}))
    more = ("recipe.epochs=3", "checkpointing.every_epochs=0", f"runs_dir={folder}/runs")
    script = str(Path(__file__).with_name("delayed.py"))
    done = subprocess.run(
        [sys.executable, script, str(folder / "delays.json"), *overrides, *more],
        capture_output=True, text=True, cwd=folder, env=environment([]), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return timeline_of(next((folder / "runs").iterdir()))


def per_step(timeline: Timeline, rank: int, phase: str) -> float:
    """Median over the steps, each of which is logged: what else runs on the machine delays some of them."""
    told = [event for event in timeline.attempts[0].ranks[rank] if event["kind"] == "step"]
    assert len(told) == STEPS
    return median(event["phases"].get(phase, 0.0) for event in told[1:])  # the first batch is part of the start


@pytest.mark.slow
def test_a_delay_of_the_loader_is_found_as_wait_for_data(tmp_path: Path, small: tuple[str, ...]) -> None:
    timeline = delayed_run(tmp_path, small, loader=DELAY_S, step=[0.02, 0.02])
    for rank in (0, 1):
        assert per_step(timeline, rank, "data_wait") == pytest.approx(DELAY_S, rel=0.05)


@pytest.mark.slow
def test_a_slower_rank_is_named_its_peer_waits_for_it_and_nobody_waits_for_data(
    tmp_path: Path, small: tuple[str, ...]
) -> None:
    timeline = delayed_run(tmp_path, small, loader=0.0, step=[0.0, DELAY_S])
    own = per_step(timeline, 0, "compute")  # on a busy machine the ranks do not compute it at the same pace
    assert per_step(timeline, 0, "communication_wait") == pytest.approx(DELAY_S, abs=0.05 * DELAY_S + own)
    assert per_step(timeline, 1, "communication_wait") < 0.15 * DELAY_S
    for rank in (0, 1):
        assert per_step(timeline, rank, "data_wait") < 0.02 * DELAY_S
    (found,) = stragglers(timeline.attempts[0])
    assert found.rank == 1
    told = [event for event in timeline.attempts[0].ranks[0] if event["kind"] == "step"]
    assert {event["ranks/slowest"] for event in told[2:]} == {1}


def test_a_run_that_was_killed_accounts_for_every_second(cli: Cli, small: tuple[str, ...], saboteur: Saboteur) -> None:
    saboteur.arm("SIGKILL", 1, 10)
    began = time.time()
    answer = cli("train", *small, "model=timm", "model.name=saboteur", "checkpointing.every_steps=4", "--json")
    assert saboteur.fired
    assert answer.code == 0, answer.err
    result = answer.json()
    timeline = timeline_of(cli.cwd / "runs" / result["run_id"])
    came = measure(timeline, {})
    launcher = load_run(cli.cwd / "runs" / result["run_id"]).launcher
    assert came.wall_s == pytest.approx(launcher[-1]["t"] - launcher[0]["began"], abs=0.01)
    assert came.wall_s <= time.time() - began
    for seconds in (came.seconds, result["seconds"], rank_split(timeline, 0), rank_split(timeline, 1)):
        assert sum(seconds.values()) == pytest.approx(came.wall_s, rel=0.01)
    told = {"compute", "start", "import", "recovery", "lost_work", "checkpoint_stall", "evaluation", "finish"}
    assert told <= set(came.seconds)
    work = count_work(timeline, samples_per_epoch=108, steps_per_epoch=7)
    assert work.epochs == {1: 108, 2: 108}
    assert 1 <= work.wasted_steps <= 2  # killed in step 10, saved at 8


def test_each_epoch_of_an_undisturbed_run_has_every_sample_once(trained: Run) -> None:
    timeline = timeline_of(trained.folder)
    work = count_work(timeline, samples_per_epoch=108, steps_per_epoch=7)
    assert (work.steps, work.wasted_steps, work.epochs) == (14, 0, {1: 108, 2: 108})
    assert {"lost_work", "recovery", "idle"} & set(measure(timeline, {}).seconds) == set()


def test_the_clock_gives_out_every_second_once() -> None:
    clock, growing = PhaseClock(time.time() - 1.0), [5.0]
    clock.add("import", 0.25)
    first = clock.take()
    assert first == {"import": pytest.approx(0.25), "start": pytest.approx(0.75, abs=0.05)}
    clock.rest = "compute"
    clock.follow("data_wait", lambda: growing[0])
    growing[0] += 0.01
    time.sleep(0.05)
    second = clock.take()
    assert second == {"data_wait": pytest.approx(0.01), "compute": pytest.approx(0.04, abs=0.02)}
    clock.add("evaluation", 100.0)  # a claim beyond the time that passed
    third = clock.take()
    assert sum(third.values()) < 0.05
    total: dict[str, Any] = clock.split()
    assert sum(total.values()) == pytest.approx(sum(sum(part.values()) for part in (first, second, third)), abs=0.01)
