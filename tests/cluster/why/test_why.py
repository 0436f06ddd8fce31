"""Why a run is stuck: the cause that was put into a healthy cluster comes first, and no other way round."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from ended_runs import CASES as ENDED
from queued_runs import CASES as QUEUED
from scenes import World, healthy
from stuck_runs import CASES as STUCK
from unplaced_runs import CASES as UNPLACED

from orchestrator.cluster.snapshot import read_snapshot
from orchestrator.cluster.why.cause import Cause, Depth, Stage, ranked
from orchestrator.cluster.why.verdict import Answer, explain

Case = tuple[Callable[[World], None], str, tuple[str, ...]]


def answer(change: Callable[[World], object] | None = None) -> Answer:
    world = healthy()
    if change:
        change(world)
    return explain(world.snapshot())


CAPTURED = Path(__file__).parent / "cases"
CASES = (*QUEUED, *UNPLACED, *STUCK, *ENDED)


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


OWN_WORLDS = {
    "ray_worker_pending",
    "ray_app_failed",
    "deadline_of_a_jobset",
    "unexplained",
    "full_beside_small_tainted_ones",
    "full_beside_control_planes",
    "out_of_memory_where_a_quota_kept_the_other_pod_away",
}
"""Changes that replace what others change, or are two already."""
PAIRS = [
    pair
    for pair in permutations((*UNPLACED, *STUCK, *ENDED), 2)
    if not {case[0].__name__ for case in pair} & OWN_WORLDS
]


def test_of_two_things_that_are_wrong_one_comes_first_and_nothing_else() -> None:
    told = 0
    for first, second in random.Random(0).sample(PAIRS, 400):
        names = f"{first[0].__name__} and {second[0].__name__}"
        try:
            found = answer(lambda world, first=first, second=second: (first[0](world), second[0](world)))
        except (IndexError, ValueError):  # the second changes what the first took away
            continue
        told += 1
        assert found.causes, names
        assert found.causes[0].name in (first[1], second[1]), names
    assert told > 250


def test_causes_are_ranked_by_the_rule_as_it_is_stated() -> None:
    plain = Cause("root", "said", "way out", Stage.training, at="2026-01-01T10:00:00Z")
    order = [
        replace(plain, name="earlier stage", stage=Stage.placing),
        plain,
        replace(plain, name="less weight", weight=-1),
        replace(plain, name="later", weight=-1, at="2026-01-01T11:00:00Z"),
        replace(plain, name="passes", passes=True, stage=Stage.queue),
        replace(plain, name="own", depth=Depth.own, stage=Stage.queue),
        replace(plain, name="follows", depth=Depth.follows, stage=Stage.queue),
        replace(plain, name="past", past=True, stage=Stage.queue),
    ]
    for seed in range(20):
        mixed = random.Random(seed).sample(order, len(order))
        assert [cause.name for cause in ranked(mixed)] == [cause.name for cause in order]


def test_the_same_cause_at_many_pods_is_told_once_with_all_of_them() -> None:
    many = [Cause("x", "said", "way out", Stage.placing, whom=(f"pod-{number}",)) for number in range(512)]
    found = ranked(many)
    assert (len(found), len(found[0].whom)) == (1, 512)


@pytest.mark.parametrize("path", sorted(CAPTURED.glob("*.json")), ids=lambda path: path.stem)
def test_what_a_real_cluster_said_of_a_broken_run_is_read(path: Path) -> None:
    """NAME.CAUSE.json: snapshots of runs that were broken on purpose on Kubernetes 1.37.2, cut to what is asked for."""
    found = explain(read_snapshot([path]))
    assert [cause.name for cause in found.causes[:1]] == [name for name in (path.stem.split(".")[1],) if name != "none"]
    assert all(cause.evidence and cause.way_out for cause in found.causes)
