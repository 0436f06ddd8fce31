"""Where the time of a run went: the split sums to the wall time and tells the truth, whatever killed the run."""

from __future__ import annotations

import random
from typing import Any

import pytest
from histories import Costs, Simulation, exponential_kills

from orchestrator.track.goodput import count_work, measure, rank_split, read_prices, recoveries, stragglers
from orchestrator.track.timeline import read_timeline

Event = dict[str, Any]


def history_of(seed: int, night: float = 0.0, mean_s: float = 4.0) -> Simulation:
    luck = random.Random(seed)
    costs = Costs(
        world_size=luck.choice([1, 2, 4]), save_every=luck.choice([2, 7, 13]), log_every=luck.choice([1, 5, 50]),
        eval_every=luck.choice([10, 20]), save_s=luck.choice([0.0, 0.3]), data_s=luck.choice([0.0, 0.03]),
        write_s=luck.choice([0.0, 0.1, 0.9]),
    )  # fmt: skip
    return Simulation(costs, exponential_kills(mean_s, seed, most=12), night, luck).play()


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("night", [0.0, 0.4])
def test_the_split_sums_to_the_wall_time_and_equals_the_truth(seed: int, night: float) -> None:
    played = history_of(seed, night)
    timeline = read_timeline(played.ranks, played.launcher)
    came = measure(timeline, {"cpu": 1.0})
    assert sum(came.seconds.values()) == pytest.approx(came.wall_s, rel=1e-6)
    for rank in played.ranks:
        assert sum(rank_split(timeline, rank).values()) == pytest.approx(came.wall_s, rel=1e-6)
    found, truth = (with_one_start(seconds) for seconds in (came.seconds, played.truth))
    for phase in truth | found:
        assert found.get(phase, 0.0) == pytest.approx(truth.get(phase, 0.0), abs=0.01 * (1 + played.kills)), phase


def with_one_start(seconds: dict[str, float]) -> dict[str, float]:
    """A rank that is killed while it imports has not told yet what of its start that was."""
    return {**seconds, "start": seconds.get("start", 0.0) + seconds.get("import", 0.0), "import": 0.0}


def test_a_run_that_nobody_disturbed_loses_nothing() -> None:
    played = Simulation(Costs(), lambda: float("inf")).play()
    timeline = read_timeline(played.ranks, played.launcher)
    came = measure(timeline, {})
    assert {"lost_work", "recovery", "idle"} & set(came.seconds) == set()
    assert came.value == pytest.approx(60 * 0.12 / came.wall_s)
    assert came.cost is None
    assert recoveries(timeline) == []
    assert count_work(timeline, 600, 30).wasted_steps == 0


@pytest.mark.parametrize("seed", range(20))
def test_steps_and_samples_that_are_computed_again_are_counted(seed: int) -> None:
    played = history_of(seed)
    work = count_work(read_timeline(played.ranks, played.launcher), samples_per_epoch=300, steps_per_epoch=30)
    assert (work.steps, work.wasted_steps) == (60, played.wasted_steps)
    assert work.wasted_samples == 10 * played.wasted_steps


def test_each_fault_tells_its_cause_and_how_long_it_took_to_the_next_first_step() -> None:
    kills = iter([3.0])
    played = Simulation(Costs(), lambda: next(kills, float("inf"))).play()
    (fault,) = recoveries(read_timeline(played.ranks, played.launcher))
    assert (fault["rank"], fault["error"], fault["attempt"]) == (1, "killed by SIGKILL", 1)
    assert fault["recovery_s"] == pytest.approx(0.3 + 0.2 + 0.5 + 0.1, abs=0.005)  # pause, import, start, first batch


def test_idle_time_costs_nothing_and_a_held_process_costs_its_price() -> None:
    played = history_of(seed=1, night=1.0)
    assert played.truth["idle"] > 3600
    timeline = read_timeline(played.ranks, played.launcher)
    came = measure(timeline, read_prices(["cpu=0.5"]))
    held = (came.wall_s - came.seconds["idle"]) * played.costs.world_size
    assert came.process_hours == pytest.approx(held / 3600)
    assert came.total_cost == pytest.approx(0.5 * held / 3600)
    assert measure(timeline, read_prices(["NVIDIA H100 80GB HBM3=2.9"])).cost is None


def step_events(compute_s: float, steps: int = 40) -> list[Event]:
    return [
        {"t": 100.0 + step, "attempt": 1, "kind": "step", "step": step, "world_size": 4,
         "phases": {"compute": compute_s, "communication_wait": 1 - compute_s}}
        for step in range(1, steps + 1)
    ]  # fmt: skip


def test_a_rank_that_takes_longer_than_the_median_is_named() -> None:
    ranks = {rank: step_events(0.65 if rank == 3 else 0.5) for rank in range(4)}
    (found,) = stragglers(read_timeline(ranks, []).attempts[0])
    assert str(found) == "rank 3 takes 1.30 × the median"
    few = {rank: step_events(0.65 if rank == 3 else 0.5, steps=10) for rank in range(4)}
    assert stragglers(read_timeline(few, []).attempts[0]) == []
    even = {rank: step_events(0.5 + 0.01 * rank) for rank in range(4)}
    assert stragglers(read_timeline(even, []).attempts[0]) == []


def test_ranks_that_are_no_part_of_an_attempt_are_idle_in_it() -> None:
    played = Simulation(Costs(world_size=2), lambda: float("inf")).play()
    smaller = Simulation(Costs(world_size=1), lambda: float("inf"), now=played.now + 5, _attempt=1).play()
    ranks = {0: played.ranks[0] + smaller.ranks[0], 1: played.ranks[1]}
    timeline = read_timeline(ranks, played.launcher + smaller.launcher)
    came, alone = measure(timeline, {}), rank_split(timeline, 1)
    assert sum(alone.values()) == pytest.approx(came.wall_s)
    assert alone["idle"] == pytest.approx(5 + sum(smaller.truth.values()) - 1.0, abs=0.05)


def test_a_missing_line_and_a_torn_one_leave_the_sum_whole() -> None:
    played = history_of(seed=5)
    luck = random.Random(0)
    for rank, events in played.ranks.items():
        played.ranks[rank] = [event for event in events if luck.random() > 0.2]
    for launcher in (played.launcher, []):
        timeline = read_timeline(played.ranks, launcher)
        came = measure(timeline, {})
        assert sum(came.seconds.values()) == pytest.approx(came.wall_s)
        assert all(seconds > 0 for seconds in came.seconds.values())


def test_nothing_recorded_is_no_time_at_all() -> None:
    came = measure(read_timeline({}, []), {})
    assert (came.wall_s, came.value, came.seconds) == (0.0, 0.0, {})
