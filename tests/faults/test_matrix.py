"""Whatever strikes a rank, wherever: the run ends with the bits, the history and the samples of one left alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cells import FOUR, HANGS, TWELVE, Cell, cells
from harness import Bench, Story, require_each_sample_once

RESULTS = "ORCHESTRATOR_FAULT_RESULTS"
"""Names a folder that gets one JSON file for each cell; `table.py` sets it."""
pytestmark = pytest.mark.timeout(240)


def marked(cell: Cell) -> Any:
    marks = [pytest.mark.faults] if cell.key in TWELVE else []
    return pytest.param(cell, id=cell.name, marks=[*marks, *([] if cell.key in FOUR else [pytest.mark.slow])])


@pytest.mark.parametrize("cell", [marked(cell) for cell in cells()])
def test_a_run_that_was_struck_ends_as_one_that_was_not(bench: Bench, cell: Cell) -> None:
    story = bench.run(cell.name, cell.strikes())
    record(cell, story, bench)
    assert len(story.struck()) == len(cell.strikes()), f"the fault did not fire\n{story.told()}"
    assert story.codes == cell.codes, story.told()
    assert story.attempts() == cell.attempts, story.told()
    if cell.kind in HANGS:
        (fault,) = story.faults()
        assert (fault["detected_by"], fault["rank"]) == ("heartbeat", cell.rank), fault
    assert story.differences(bench.undisturbed) == []
    require_each_sample_once(story, bench.steps_per_epoch, bench.num_samples)
    assert story.leftovers == ()


def record(cell: Cell, story: Story, bench: Bench) -> None:
    if RESULTS not in os.environ:
        return
    finished = story.codes[-1] == 0
    content = {
        "kind": cell.kind,
        "rank": cell.rank,
        "phase": cell.phase,
        "fired": len(story.struck()) == len(cell.strikes()),
        "codes": story.codes,
        "attempts": story.attempts(),
        "as_expected": (story.codes, story.attempts()) == (cell.codes, cell.attempts),
        "differences": story.differences(bench.undisturbed) if finished else ["not finished"],
        "leftovers": story.leftovers,
        "seconds": round(story.seconds, 1),
        **story.times(),
    }
    Path(os.environ[RESULTS], f"{cell.name}.json").write_text(json.dumps(content))


def test_an_undisturbed_run_leaves_nothing_behind_and_sees_each_sample_once(bench: Bench) -> None:
    require_each_sample_once(bench.undisturbed, bench.steps_per_epoch, bench.num_samples)
    assert bench.undisturbed.leftovers == ()


def test_the_grid_has_the_announced_cells() -> None:
    names = {cell.key for cell in cells()}
    assert len(names) == 13 * 8 - 6
    assert len(FOUR) == 4
    assert len(TWELVE) == 12
    assert names >= TWELVE
    assert {kind for kind, _, _ in TWELVE} == {kind for kind, _, _ in names} - {"abort"}
