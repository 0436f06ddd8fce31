"""A run folder is read as far as it is written, and each step counts once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_up_runs import STEPS_PER_EPOCH, MadeUpRun

from orchestrator.track.runs import history, load_run, series


def step(attempt: int, number: int) -> dict[str, Any]:
    return {"kind": "step", "attempt": attempt, "step": number, "epoch": number / 10, "train/loss": 1.0}


def test_an_empty_or_missing_folder_is_a_run_that_is_starting(tmp_path: Path):
    run = load_run(tmp_path / "nothing-here")
    assert (run.run_id, run.state, run.events, run.config, run.data) == ("nothing-here", "starting", [], {}, {})


@pytest.mark.parametrize("torn", ["run.json", "result.json", "evaluation.json"])
def test_a_half_written_file_counts_as_not_there(torn: str, tmp_path: Path):
    folder = MadeUpRun().write(tmp_path / "quickstart-00000000")
    content = (folder / torn).read_text()
    (folder / torn).write_text(content[: len(content) // 2])
    run = load_run(folder)
    parts = {"run.json": run.bundle, "result.json": run.result, "evaluation.json": run.evaluation}
    assert not parts.pop(torn)
    assert all(parts.values())


def test_every_cut_of_the_event_file_keeps_the_whole_lines(tmp_path: Path):
    folder = MadeUpRun(epochs=1).write(tmp_path / "r")
    path = folder / "events" / "rank_0.jsonl"
    content = path.read_bytes()
    events = load_run(folder).events
    for cut in range(0, len(content), 37):
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        assert load_run(folder).events[:whole] == events[:whole]
        assert len(load_run(folder).events) <= whole + 1


@pytest.mark.parametrize("resumed_at", [(), (46,), (23, 46), (69, 46, 161)])
def test_each_step_counts_once_and_comes_from_the_last_attempt_that_did_it(resumed_at: tuple[int, ...]):
    events = MadeUpRun(resumed_at=resumed_at).events()
    told = [e for e in history(events) if e["kind"] == "step"]
    assert [e["step"] for e in told] == list(range(5, 10 * STEPS_PER_EPOCH + 1, 5))
    for event in told:
        attempts = [e["attempt"] for e in events if e["kind"] == "step" and e["step"] == event["step"]]
        assert event["attempt"] == max(attempts)


def test_an_attempt_without_a_start_event_goes_on_at_its_first_step():
    events = [step(1, n) for n in (1, 2, 3, 4)] + [step(2, n) for n in (3, 4, 5)]
    assert [(e["attempt"], e["step"]) for e in history(events)] == [(1, 1), (1, 2), (2, 3), (2, 4), (2, 5)]


def test_an_event_without_a_step_takes_nothing_back():
    events = [step(1, 1), {"kind": "note", "attempt": 2}, step(2, 2)]
    assert history(events) == events


def test_a_missing_figure_is_no_point_and_a_fraction_is_its_value():
    events = [
        {"kind": "eval", "epoch": 1, "val/acc1": {"hits": 3, "count": 4, "value": 0.75}},
        {"kind": "eval", "epoch": 2, "val/acc1": None},
        {"kind": "step", "epoch": 2, "val/acc1": 0.1},
    ]
    assert series(events, "eval", "val/acc1") == ([1.0], [0.75])
