"""Why a run is stuck: the cause that was put into a healthy cluster comes first, and no other way round."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ended_runs import CASES as ENDED
from queued_runs import CASES as QUEUED
from scenes import World, healthy
from stuck_runs import CASES as STUCK

from orchestrator.cluster.why.verdict import Answer, explain

Case = tuple[Callable[[World], None], str, tuple[str, ...]]


def answer(change: Callable[[World], object] | None = None) -> Answer:
    world = healthy()
    if change:
        change(world)
    return explain(world.snapshot())


CASES = (*QUEUED, *STUCK, *ENDED)


@pytest.mark.parametrize(("change", "cause", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_what_was_put_into_a_healthy_cluster_comes_first(change: Callable, cause: str, words: tuple[str, ...]) -> None:
    found = answer(change)
    assert [one.name for one in found.causes][:1] == [cause], found.causes
    first = found.causes[0]
    text = " ".join((first.said, first.way_out, *(f"{one.object} {one.field} {one.value}" for one in first.evidence)))
    for word in words:
        assert word in text
    assert first.evidence
    assert first.way_out
    assert found.exit_code == (75 if first.passes else 42)


def test_nothing_is_wrong_with_a_healthy_run() -> None:
    found = answer()
    assert (found.causes, found.said, found.exit_code) == ((), "step 412 of 1,000", 0)
