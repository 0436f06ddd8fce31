"""A run that is stopped after each of its steps has, after each, the state of one that was left alone."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from harness import Bench, Story, Strike
from launching import read_events

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
EACH = ("checkpointing.every_steps=1", "checkpointing.keep_last=100")
LAST = 60


def manifests(story: Story) -> dict[int, dict[str, Any]]:
    paths = sorted(story.run_folder.glob("checkpoints/step_*/manifest.json"))
    return {content["step"]: content for content in (json.loads(path.read_text()) for path in paths)}


def test_the_state_after_each_step_is_the_same_however_often_the_run_was_stopped(
    bench: Bench,
) -> None:
    """A command for each step, and one for the last evaluation: by induction a stop at any step changes nothing."""
    left_alone = bench.run("every-step", more=EACH)
    strikes = [Strike("SIGTERM", step % 2, "step", step) for step in range(LAST)]
    stopped = bench.run("stopped-at-every-step", strikes, more=EACH)
    assert len(stopped.struck()) == LAST
    assert stopped.codes == (143,) * LAST + (0,)
    mine, theirs = manifests(stopped), manifests(left_alone)
    assert list(mine) == list(theirs) == list(range(1, LAST + 1))
    for key in ("state_sha256", "unlogged", "metrics"):
        assert [mine[step][key] for step in mine] == [theirs[step][key] for step in theirs], key
    assert stopped.differences(left_alone) == []
    assert stopped.leftovers == ()
    seconds = latencies(stopped.run_folder, stopped.struck())
    p50, p95 = statistics.median(seconds), sorted(seconds)[round(0.95 * len(seconds)) - 1]
    print(f"signal to the last rank's stop, save included: p50 {p50:.3f} s, p95 {p95:.3f} s of {len(seconds)} stops")


def latencies(folder: Path, struck: list[dict[str, Any]]) -> list[float]:
    """Seconds from each signal to the stop of the last rank, which follows its save."""
    stops: dict[int, float] = {}
    for rank in (0, 1):
        for event in read_events(folder, rank):
            if event["kind"] == "stop":
                stops[event["attempt"]] = max(event["t"], stops.get(event["attempt"], 0.0))
    return [stops[strike["attempt"]] - strike["t"] for strike in struck if strike["attempt"] in stops]
