"""Who is late, from signs of life alone."""

from __future__ import annotations

import pytest

from orchestrator.cluster.attempt import choose_culprit
from orchestrator.cluster.stacks import Stack, main_thread
from orchestrator.cluster.watch import BUDGET_KEYS, find_late, steps_done
from orchestrator.compose import compose
from orchestrator.config import ClusterConfig
from orchestrator.train.heartbeat import PHASES, Sign

NOW = 1000.0


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    budgets = [f"cluster.{key}={10 * (number + 1)}" for number, key in enumerate(sorted(set(BUDGET_KEYS.values())))]
    return compose(["data=synthetic", *budgets]).config.cluster


def sign(phase: str, silent_s: float, beats: int = 5, step: int = 7) -> Sign:
    return Sign(1, phase, step, NOW - silent_s, beats)


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_is_late_once_its_phase_s_budget_is_used_up_and_not_before(config: ClusterConfig, phase: str) -> None:
    budget = getattr(config, BUDGET_KEYS[phase])
    assert find_late({0: sign(phase, budget - 0.1)}, config, NOW) == []
    (late,) = find_late({0: sign(phase, budget + 0.1)}, config, NOW)
    assert (late.rank, late.phase, late.step, late.key) == (0, phase, 7, BUDGET_KEYS[phase])


def test_the_rank_with_fewest_beats_is_late_and_its_peers_wait(config: ClusterConfig) -> None:
    signs = {0: sign("step", 500, beats=9), 1: sign("step", 501, beats=8), 2: sign("step", 500, beats=9)}
    assert [late.rank for late in find_late(signs, config, NOW)] == [1]


def test_peers_that_wait_for_a_long_save_within_its_budget_are_not_hung(config: ClusterConfig) -> None:
    signs = {0: sign("save", config.hang_save_s - 1, beats=8), 1: sign("step", 10_000, beats=9)}
    assert find_late(signs, config, NOW) == []


def test_of_level_ranks_the_longest_silent_one_comes_first(config: ClusterConfig) -> None:
    signs = {0: sign("step", 500), 1: sign("step", 600)}
    assert [late.rank for late in find_late(signs, config, NOW)] == [1, 0]


def test_of_level_ranks_none_is_late_before_all_are_because_the_first_may_wait_for_the_last(
    config: ClusterConfig,
) -> None:
    signs = {0: sign("step", config.hang_step_s + 0.2), 1: sign("step", config.hang_step_s - 0.1)}
    assert find_late(signs, config, NOW) == []
    assert len(find_late(signs, config, NOW + 0.2)) == 2


def test_of_level_ranks_a_stopped_one_is_named_then_one_that_waits_for_nobody(config: ClusterConfig) -> None:
    late = find_late({0: sign("step", 600), 1: sign("step", 500), 2: sign("step", 500)}, config, NOW)
    waits = Stack(False, ("/x/torch/distributed/distributed_c10d.py:1 in all_reduce",))
    own = Stack(False, ("/home/me/model.py:3 in forward",))
    assert choose_culprit(late, {0: waits, 1: own, 2: waits}).rank == 1
    assert choose_culprit(late, {0: waits, 1: own, 2: Stack(True, waits.frames)}).rank == 2
    assert choose_culprit(late, {0: waits, 1: waits, 2: waits}).rank == 0
    assert choose_culprit(late, {}).rank == 0


def test_the_farthest_rank_tells_how_many_steps_were_computed() -> None:
    assert steps_done({0: sign("step", 1, step=3), 1: sign("step", 1, step=4)}) == 4


def test_the_main_thread_is_the_last_that_a_dump_lists() -> None:
    dump = (
        'Thread 0x1 (most recent call first):\n  File "/a.py", line 1 in poll\n\n'
        "Current thread 0x2 (most recent call first):\n"
        '  File "/b.py", line 2 in inner\n  File "/c.py", line 3 in outer\n'
    )
    assert main_thread(dump) == ("/b.py:2 in inner", "/c.py:3 in outer")
    assert main_thread("") == ()
