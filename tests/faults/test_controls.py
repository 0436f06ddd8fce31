"""The comparison itself: it is green for two runs that must agree, and red for every mistake that it should find."""

from __future__ import annotations

import pytest
from bugs import BUGS
from cells import STEP
from harness import Bench, Strike

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]
KILL = Strike("SIGKILL", 1, "step", STEP + 10)
"""Three steps after a save, and long enough after the first one that there is an older checkpoint."""


def test_two_undisturbed_runs_agree(bench: Bench) -> None:
    assert bench.run("again").differences(bench.undisturbed) == []


def test_another_seed_disagrees_in_bits_history_and_samples(bench: Bench) -> None:
    found = bench.run("other-seed", more=["seed=1"]).differences(bench.undisturbed)
    assert {"run_id", "state_sha256", "weights_sha256", "history step 5", "samples 1"} <= set(found)


def test_a_killed_run_without_a_bug_is_green(bench: Bench) -> None:
    story = bench.run("no-bug", [KILL])
    assert len(story.struck()) == 1
    assert story.differences(bench.undisturbed) == []


@pytest.mark.parametrize("bug", BUGS)
def test_a_deliberate_bug_turns_the_comparison_red(bench: Bench, bug: str) -> None:
    story = bench.run(bug, [KILL], bug)
    assert len(story.struck()) == 1
    assert story.attempts() > 1
    if story.codes[-1] == 0:
        found = story.differences(bench.undisturbed)
        assert "state_sha256" in found
        assert any(key.startswith("samples") for key in found) == (bug in ("skip a sample", "resume one step off")), (
            found
        )
