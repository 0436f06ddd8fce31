"""A run that gives way to a more important one saves, waits and goes on: it ends in the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from administrator import queue_of
from live import Cluster, Live

from orchestrator.cluster.kubernetes.resources import JOB, JOBSET, WORKLOAD

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
SHORT = ("recipe.epochs=4", "seed=1")
LONG = ("recipe.epochs=80", "seed=3")
KINDS = {"job": JOB, "jobset": JOBSET}
ONE_RUN = {"cpu": "1", "memory": "64Gi", "ephemeral-storage": "64Gi"}
"""Room for two pods of half a CPU."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, data: Cluster) -> str:
    if not data.api.serves(KINDS[request.param]):
        pytest.skip(f"NOT SERVED: the cluster knows no {request.param}")
    return request.param


@pytest.fixture(scope="module")
def queues(data: Cluster) -> Cluster:
    if not data.api.serves(WORKLOAD):
        pytest.skip("NOT SERVED: the cluster has no Kueue")
    return data


def test_a_run_gives_way_to_a_more_important_one_and_ends_in_the_same_bits(
    submit: Callable[..., Live], queues: Cluster, local_weights: Callable[..., str], kind: str
) -> None:
    with queue_of(queues.api, kind, ONE_RUN) as queue:
        low = submit(*LONG, f"cluster.queue={queue}", f"cluster.priority={queue}-low")
        low.wait(lambda facts: (facts["step"] or 0) > 10, "ten steps")
        high = submit(*SHORT, f"cluster.queue={queue}", f"cluster.priority={queue}-high")
        facts = low.wait(lambda facts: facts["state"] == "queued", "the run to give way")
        assert facts["reason"].startswith("Preempted to accommodate a workload"), facts
        assert "due to prioritization in the ClusterQueue" in facts["reason"]
        high.end()
        assert high.weights() == local_weights(*SHORT)
        assert low.end()["attempt"] == 2
        assert retries_of(low, kind) == 0
        assert low.weights() == local_weights(*LONG)
    folder = low.cli.cwd / "pulled" / low.run_id
    assert codes_of(folder) == [143, 0]
    assert low.cli("status", folder, "--json").json()["wasted_steps"] == 0


def codes_of(folder: Path) -> list[int]:
    """How each attempt ended, by the run's own record."""
    events = map(json.loads, (folder / "events" / "launcher.jsonl").read_text().splitlines())
    return [event["exit_code"] for event in events if event["kind"] == "end"]


def retries_of(live: Live, kind: str) -> int:
    """What counts towards the end of the run's patience."""
    status = live.cluster.api.get(KINDS[kind], live.run_id)["status"]
    return status.get("restartsCountTowardsMax", 0) + status.get("failed", 0)


def test_a_run_that_its_queue_has_no_room_for_says_what_it_waits_for(
    submit: Callable[..., Live], queues: Cluster, kind: str
) -> None:
    with queue_of(queues.api, f"{kind}-small", {**ONE_RUN, "cpu": "500m"}) as queue:
        live = submit(*SHORT, f"cluster.queue={queue}", f"cluster.priority={queue}-low")
        facts = live.wait(lambda facts: "quota" in (facts["reason"] or ""), "the queue's word")
        assert facts["state"] == "queued"
        assert "cpu" in facts["reason"]
        assert live.pods() == []
