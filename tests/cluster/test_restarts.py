"""Whether a run starts again: a table of histories."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.cluster.cause import Ended
from orchestrator.cluster.restarts import (
    LONGEST_PAUSE_S,
    Attempt,
    decide,
    final_end,
    fruitless,
    pause_s,
    read_attempts,
)

OWN = Ended(1, 0, "ArithmeticError: x", by_itself=True)
KILLED = Ended(137, 1, "killed by SIGKILL")
NETWORK = Ended(75, 0, "the store is away")
RESIZED = Ended(46)


def attempts(*pairs: tuple[Ended, int]) -> list[Attempt]:
    return [Attempt(ended, step) for ended, step in pairs]


@pytest.mark.parametrize("code", [0, 42, 43, 45, 130, 143])
def test_final_codes_end_the_run_however_many_restarts_are_left(code: int) -> None:
    ended = Ended(code)
    assert decide(attempts((ended, 5)), 100, 1.0).ended == ended


@pytest.mark.parametrize("code", [1, 7, 44, 75, 134, 137, 139, 255])
def test_other_codes_start_it_again_at_once_while_restarts_are_left(code: int) -> None:
    ended = Ended(code, 0, "x")
    assert decide(attempts((ended, 5)), 1, 1.0).ended is None
    assert decide(attempts((ended, 5)), 1, 1.0).pause_s == 0
    assert decide(attempts((ended, 5)), 0, 1.0).ended == ended


def test_three_failures_of_its_own_at_one_step_end_it_with_43_and_the_last_cause() -> None:
    verdict = decide(attempts((OWN, 6), (OWN, 6), (OWN, 6)), 100, 1.0).ended
    assert verdict is not None
    assert (verdict.exit_code, verdict.rank) == (43, 0)
    assert verdict.error is not None
    assert "3 attempts without getting beyond step 6" in verdict.error
    assert "ArithmeticError: x" in verdict.error


def test_so_do_three_before_the_first_step() -> None:
    verdict = decide(attempts((OWN, 0), (OWN, 0), (OWN, 0)), 100, 1.0).ended
    assert verdict is not None
    assert verdict.exit_code == 43
    assert "through its first step" in str(verdict.error)


def test_a_fault_that_comes_a_little_later_each_time_goes_on_until_restarts_run_out() -> None:
    history = attempts(*((OWN, step) for step in (6, 8, 10, 12, 14)))
    assert decide(history, 100, 1.0).ended is None
    assert decide(history, 4, 1.0).ended == OWN


def test_kills_from_outside_and_the_network_never_count_as_no_progress() -> None:
    assert decide(attempts(*((KILLED, 3) for _ in range(50))), 100, 0.0).ended is None
    assert decide(attempts(*((NETWORK, 0) for _ in range(50))), 100, 0.0).ended is None


def test_they_do_not_hide_the_failures_between_which_they_come_either() -> None:
    history = attempts((OWN, 6), (KILLED, 2), (OWN, 6), (NETWORK, 0), (OWN, 6))
    assert fruitless(history) == 3
    assert decide(history, 100, 1.0).ended is not None


def test_failures_before_the_farthest_step_was_reached_are_forgotten() -> None:
    history = attempts((OWN, 2), (OWN, 2), (KILLED, 9), (OWN, 4), (OWN, 4))
    assert fruitless(history) == 2
    assert decide(history, 100, 1.0).ended is None


def test_a_change_of_processes_costs_no_restart_and_no_pause() -> None:
    history = attempts(*((RESIZED, step) for step in range(9)))
    assert decide(history, 0, 1.0) == decide(history[:1], 0, 1.0)
    assert decide(history, 0, 1.0).ended is None


def test_pauses_double_only_while_no_attempt_gets_further() -> None:
    def pauses(*steps: int) -> list[float]:
        history = attempts(*((KILLED, step) for step in steps))
        return [pause_s(history[: number + 1], 1.0) for number in range(len(history))]

    assert pauses(5, 5, 5, 5) == [0, 1, 2, 4]
    assert pauses(5, 7, 9, 11) == [0, 0, 0, 0]
    assert pauses(5, 5, 9, 9, 9) == [0, 1, 0, 1, 2]
    assert pauses(*[0] * 40)[-1] == LONGEST_PAUSE_S


def test_the_cause_of_no_progress_keeps_its_traceback() -> None:
    own = replace(OWN, traceback="Traceback ...")
    verdict = decide(attempts((own, 1), (own, 1), (own, 1)), 9, 0.0).ended
    assert verdict is not None
    assert verdict.traceback == own.traceback


def fault(attempt: int, step: int, by_itself: bool = True) -> dict[str, Any]:
    facts = {"rank": 1, "exit_code": 1, "signal": None, "error": "ArithmeticError: x", "by_itself": by_itself}
    return {"kind": "fault", "attempt": attempt, "step": step, **facts}


def end(attempt: int, exit_code: int) -> dict[str, Any]:
    return {"kind": "end", "attempt": attempt, "exit_code": exit_code}


def test_failures_of_earlier_lives_count_as_the_journal_tells_them() -> None:
    journal = [event for number in (1, 2, 3) for event in (fault(number, 6), end(number, 1))]
    assert final_end(read_attempts(journal[:4])) is None
    ended = final_end(read_attempts(journal))
    assert ended is not None
    assert (ended.exit_code, ended.rank) == (43, 1)
    assert "3 attempts without getting beyond step 6, at last so: ArithmeticError: x" in str(ended.error)


def test_a_preemption_between_them_neither_counts_nor_forgives() -> None:
    journal = [fault(1, 6), fault(2, 6), end(3, 143), fault(4, 6, by_itself=False)]
    assert final_end(read_attempts(journal)) is None
    assert final_end(read_attempts([*journal, fault(5, 6)])) is not None


@pytest.mark.parametrize("code", [42, 43, 45, 130])
def test_somebody_who_starts_a_run_again_has_all_tries_anew(code: int) -> None:
    journal = [fault(1, 6), fault(2, 6), fault(3, 6), end(3, code), fault(4, 6)]
    assert final_end(read_attempts(journal)) is None
    assert [attempt.step for attempt in read_attempts(journal)] == [6]


def test_a_journal_of_before_that_does_not_say_whose_failure_it_was_counts_none() -> None:
    old = {key: value for key, value in fault(1, 6).items() if key != "by_itself"}
    assert final_end(read_attempts([old] * 3 + [old])) is None
