"""Ray starts again what our table of exit codes says, and the first true cause is the one that is told."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.cause import Ended, killed
from orchestrator.cluster.ray.meeting import restart_file, stopping_file
from orchestrator.cluster.ray.verdict import Judge, RunEnded, first_end
from orchestrator.cluster_config import ClusterConfig
from orchestrator.compose import Composed
from orchestrator.errors import EXIT_RESIZED

KILLED = killed(1, 9, False)
PEER = Ended(1, 0, "RuntimeError: [enforce fail] Connection closed by peer [10.0.0.2]:4711", "trace", by_itself=True)
OWN = Ended(1, 1, "ArithmeticError: the saboteur struck", "trace", by_itself=True)
USER = Ended(42, 1, "data.train = /x: is gone", by_itself=True)
GONE = "The actor died because its node has died."


@pytest.fixture
def judge(composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    monkeypatch.setattr("orchestrator.cluster.ray.verdict.SAME_TIME_S", 0.0)
    (tmp_path / "logs" / "attempt_1").mkdir(parents=True)
    return Judge(tmp_path, composed.config.cluster)


def error(rank: int, t: float) -> dict[str, Any]:
    return {"rank": rank, "t": t}


@pytest.mark.parametrize(
    ("told", "gone", "errors", "first"),
    [
        pytest.param({0: PEER, 1: KILLED}, {}, [error(0, 1)], KILLED, id="killed before its peer's error"),
        pytest.param({0: PEER, 1: OWN}, {}, [error(0, 2), error(1, 1)], OWN, id="the earlier error"),
        pytest.param({0: PEER, 1: USER}, {}, [error(0, 1), error(1, 2)], USER, id="what no retry mends, clocks or not"),
    ],
)
def test_the_first_cause_is_told(told: Any, gone: Any, errors: Any, first: Ended) -> None:
    assert first_end(told, gone, errors) == first


def test_a_worker_that_is_gone_is_the_cause_of_its_peers_errors() -> None:
    ended = first_end({0: PEER}, {1: GONE}, [error(0, 1)])
    assert (ended.exit_code, ended.rank, ended.by_itself) == (137, 1, False)
    assert ended.error == f"its worker is gone: {GONE}"


def test_a_lost_connection_alone_comes_from_outside() -> None:
    ended = first_end({0: PEER}, {}, [error(0, 1)])
    assert (ended.exit_code, ended.by_itself) == (75, False)


@pytest.mark.parametrize("code", [42, 43])
def test_what_no_retry_mends_ends_the_run_at_once(judge: Judge, code: int) -> None:
    ended = Ended(code, 0, "no", by_itself=True)
    with pytest.raises(RunEnded) as caught:
        judge.judge(1, {0: ended}, {})
    assert caught.value.ended == ended


@pytest.mark.parametrize("code", [75, 44])
def test_what_a_retry_may_mend_is_counted_up_to_max_restarts(judge: Judge, code: int) -> None:
    ended = Ended(code, 0, "the network")
    for _ in range(judge.cluster.max_restarts):
        judge.judge(1, {0: ended}, {})
    with pytest.raises(RunEnded) as caught:
        judge.judge(1, {0: ended}, {})
    assert caught.value.ended == ended


@pytest.mark.parametrize("code", [143, 130])
def test_a_preemption_is_never_counted(judge: Judge, code: int) -> None:
    for _ in range(10):
        judge.judge(1, {0: Ended(code, 0), 1: Ended(code, 1)}, {})
    assert judge.attempts == []


def test_ranks_that_are_told_to_go_with_the_driver_are_not_started_again(judge: Judge) -> None:
    stopping_file(judge.folder).touch()
    judge.judge(1, {0: Ended(EXIT_RESIZED, 0)}, {})
    with pytest.raises(RunEnded) as caught:
        judge.judge(1, {0: Ended(143, 0), 1: Ended(143, 1)}, {})
    assert caught.value.ended == Ended(45)


def test_three_failures_of_its_own_without_a_step_between_them_are_no_progress(judge: Judge) -> None:
    judge.judge(1, {1: OWN}, {})
    judge.judge(1, {1: OWN}, {})
    with pytest.raises(RunEnded, match="no progress: the run failed by itself in 3 attempts") as caught:
        judge.judge(1, {1: OWN}, {})
    assert caught.value.ended.exit_code == 43


def test_kills_from_outside_are_not_its_own_failures(judge: Judge) -> None:
    for _ in range(3):
        judge.judge(1, {1: KILLED}, {})
    with pytest.raises(RunEnded) as caught:
        judge.judge(1, {1: KILLED}, {})
    assert caught.value.ended.exit_code == 137


def test_the_pause_before_the_next_attempt_is_left_for_the_workers(judge: Judge) -> None:
    pauses = []
    for _ in range(3):
        judge.judge(1, {1: KILLED}, {})
        pauses.append(json.loads(restart_file(judge.folder).read_text())["pause_s"])
    assert pauses == [0.0, judge.cluster.backoff_s, 2 * judge.cluster.backoff_s]


def test_a_fault_is_written_down_as_the_local_launcher_does(judge: Judge) -> None:
    judge.judge(1, {1: KILLED}, {})
    event = json.loads((judge.folder / "events" / "launcher.jsonl").read_text())
    assert {key: event[key] for key in ("kind", "attempt", "rank", "exit_code", "signal", "error")} == {
        "kind": "fault", "attempt": 1, "rank": 1, "exit_code": 137, "signal": 9, "error": "killed by SIGKILL",
    }  # fmt: skip


def test_ends_travel_between_rays_processes(composed: Composed, tmp_path: Path) -> None:
    config: ClusterConfig = composed.config.cluster
    assert pickle.loads(pickle.dumps(RunEnded(OWN))).ended == OWN
    assert pickle.loads(pickle.dumps(Judge(tmp_path, config))) == Judge(tmp_path, config)
