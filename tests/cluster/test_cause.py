"""The first true cause among the ends of several ranks."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.cause import Ended, first_cause, out_of_memory_kills


def told(rank: int, t: float, exit_code: int = 1, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "t": t, "exit_code": exit_code, "error": f"of rank {rank}", "traceback": None, **more}


def test_a_rank_killed_by_a_signal_is_the_cause_whatever_its_peers_say() -> None:
    ended = first_cause({0: 1, 1: -9}, [told(0, 1.0)])
    assert (ended.exit_code, ended.rank, ended.error, ended.by_itself) == (137, 1, "killed by SIGKILL", False)


def test_else_the_earliest_error_is_the_cause() -> None:
    ended = first_cause({0: 1, 1: 1}, [told(0, 2.0), told(1, 1.0)])
    assert (ended.rank, ended.error) == (1, "of rank 1")


@pytest.mark.parametrize(
    ("number", "own"),
    [("SIGKILL", False), ("SIGHUP", False), ("SIGSEGV", True), ("SIGABRT", True), ("SIGBUS", True), ("SIGFPE", True)],
)
def test_only_signals_that_a_process_earns_are_failures_of_its_own(number: str, own: bool) -> None:
    ended = first_cause({1: -getattr(signal, number)}, [])
    assert ended.by_itself is own
    assert ended.error == f"killed by {number}"
    assert ended.exit_code == 128 + getattr(signal, number)


def test_sigkill_by_the_kernel_for_memory_is_one_too_and_says_so() -> None:
    ended = first_cause({0: -9}, [], out_of_memory=True)
    assert ended.by_itself
    assert ended.error == "killed by SIGKILL because memory ran out"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_request_to_stop_that_met_a_rank_too_early_is_no_failure(number: int, code: int) -> None:
    assert first_cause({0: -number}, []) == Ended(code)


@pytest.mark.parametrize(("code", "own"), [(42, True), (44, False), (75, False), (1, True), (7, True)])
def test_the_node_and_the_network_are_not_the_run_s_own_failures(code: int, own: bool) -> None:
    assert first_cause({0: code}, [told(0, 1.0, code)]).by_itself is own


def test_a_silent_exit_is_told_with_its_code() -> None:
    ended = first_cause({1: 7}, [])
    assert (ended.exit_code, ended.rank, ended.error) == (7, 1, "ended with code 7")


def test_a_lost_device_is_known_by_its_error() -> None:
    assert first_cause({0: 44}, [told(0, 1.0, 44, kind="DeviceError")]).lost_device
    assert not first_cause({0: 44}, [told(0, 1.0, 44, kind="NodeError")]).lost_device


@pytest.mark.parametrize("name", ["memory.events", "memory/memory.oom_control"])
def test_kills_for_memory_are_read_from_either_generation_of_control_groups(tmp_path: Path, name: str) -> None:
    assert out_of_memory_kills(tmp_path) == 0
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("low 0\noom 3\noom_kill 2\n")
    assert out_of_memory_kills(tmp_path) == 2
