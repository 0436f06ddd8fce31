"""The same run on a real cluster, by the commands of a user: it ends in the same bits, whatever happens to its pods.

What is marked `landing` is the short selection: a Job and a JobSet that are sent, cancelled, resumed and killed.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

import pytest
from live import Cluster, Live, processes_of

from orchestrator.cluster.kubernetes.backend import KubernetesBackend
from orchestrator.cluster.kubernetes.resources import POD

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]
Submit = Callable[..., Live]
Local = Callable[..., str]
SHORT = ("recipe.epochs=4", "seed=1")
LONG = ("recipe.epochs=40", "seed=2")
END_S = 300.0


def kinds(*others: str) -> pytest.MarkDecorator:
    """In a Job and a JobSet, which belong to the selection, and in these kinds."""
    first = [pytest.param(kind, marks=pytest.mark.landing) for kind in ("job", "jobset")]
    return pytest.mark.parametrize("kind", [*first, *others], indirect=True)


every_kind = pytest.mark.parametrize("kind", ["job", "jobset", "trainjob", "rayjob"], indirect=True)


def started(submit: Submit, *overrides: str) -> Live:
    """A long run that has computed some steps."""
    live = submit(*LONG, *overrides)
    live.wait(lambda facts: (facts["step"] or 0) > 10, "ten steps")
    return live


@kinds("trainjob", "rayjob")
def test_a_run_over_two_nodes_ends_in_the_bits_of_this_machine(submit: Submit, local_weights: Local) -> None:
    live = submit(*SHORT)
    live.wait(lambda facts: facts["state"] == "running", "a start")
    assert len({pod["spec"]["nodeName"] for pod in live.running()}) == 2
    followed = live.verb("logs", "-f", "--json")
    assert followed.code == 0, followed.err
    lines = [json.loads(line) for line in followed.out.splitlines()]
    assert {line["rank"] for line in lines} >= {0, 1}
    keys = [(line["attempt"], line["rank"], line["number"]) for line in lines if line["rank"] is not None]
    assert len(keys) == len(set(keys))
    facts = live.end()
    assert (facts["exit_code"], facts["attempt"], facts["restarts"]) == (0, 1, 0)
    assert live.weights() == local_weights(*SHORT)
    again = live.verb("logs", "--json")
    assert [json.loads(line) for line in again.out.splitlines() if '"rank": 0' in line] == [
        line for line in lines if line["rank"] == 0
    ]


@kinds("trainjob", "rayjob")
def test_a_run_that_is_cancelled_and_resumed_ends_in_the_same_bits(submit: Submit, local_weights: Local) -> None:
    live = started(submit, "cluster.max_restarts=0")
    cancelled = live.verb("cancel")
    assert cancelled.code == 0, cancelled.err
    assert live.running() == []
    assert live.facts()["state"] == "stopped"
    resumed = live.verb("resume")
    assert resumed.code == 0, resumed.err
    facts = live.end(END_S)
    assert facts["attempt"] == 2
    assert live.weights() == local_weights(*LONG)
    assert live.computed_twice() == []


@pytest.mark.parametrize(
    ("kind", "component", "number"),
    [
        pytest.param("job", "node", 1, marks=pytest.mark.landing),
        ("job", "node", 0),
        ("jobset", "node", 1),
        pytest.param("jobset", "node", 0, marks=pytest.mark.landing),
        ("trainjob", "node", 0),
        ("rayjob", "node", 0),
        ("rayjob", "head", 0),
    ],
    indirect=["kind"],
)
def test_a_run_whose_pod_is_killed_ends_in_the_same_bits(
    submit: Submit, local_weights: Local, component: str, number: int
) -> None:
    """Ranks do not need the head of their Ray cluster: they may come to the end without it."""
    live = started(submit)
    live.cluster.api.delete(POD, live.running(component)[number]["metadata"]["name"], grace_s=0)
    facts = live.end(END_S)
    assert component == "head" or facts["attempt"] == 2
    assert live.weights() == local_weights(*LONG)


@every_kind
def test_a_run_whose_process_is_killed_ends_in_the_same_bits(submit: Submit, local_weights: Local, kind: str) -> None:
    """SIGKILL of a launcher, which its ranks follow; on Ray of a rank."""
    live = started(submit)
    words = ("jobs.ray_driver", "--rank") if kind == "rayjob" else ("jobs.node",)
    pids = processes_of(live.running()[0], words)
    if not pids:
        pytest.skip("NOT HERE: the cluster's nodes are other machines, where no process can be killed")
    os.kill(min(pids), signal.SIGKILL)
    facts = live.end(END_S)
    assert facts["attempt"] == 2
    assert live.weights() == local_weights(*LONG)


@pytest.mark.parametrize(
    ("kind", "component"),
    [("job", "node"), ("jobset", "node"), ("trainjob", "node"), ("rayjob", "node"), ("rayjob", "head")],
    indirect=["kind"],
)
def test_a_run_one_of_whose_pods_is_evicted_saves_first_and_spends_no_restart(
    submit: Submit, local_weights: Local, component: str
) -> None:
    """KubeRay counts the loss of a head, whatever its end: that is a new cluster."""
    live = started(submit, f"cluster.max_restarts={int(component == 'head')}")
    live.evict(live.running(component)[-1])
    facts = live.end(END_S)
    assert facts["attempt"] == 2
    assert live.weights() == local_weights(*LONG)
    assert live.computed_twice() == []


@pytest.mark.parametrize("kind", ["job", "rayjob"], indirect=True)
def test_every_rank_says_where_it_is(submit: Submit) -> None:
    live = started(submit)
    answer = live.verb("stack", "--json")
    assert answer.code == 0, answer.err
    stacks = answer.json()
    assert sorted(stacks) == ["0", "1"]
    assert all(any("orchestrator/" in frame for frame in frames) for frames in stacks.values())


@every_kind
def test_a_users_mistake_ends_the_run_at_once(submit: Submit) -> None:
    live = submit(*SHORT, "data.train=/runs/nowhere")
    facts = live.wait(lambda facts: facts["state"] in ("done", "failed", "stopped"), "an end")
    assert (facts["state"], facts["exit_code"], facts["restarts"]) == ("failed", 42, 0)
    assert "/runs/nowhere" in facts["reason"]


SPEAKER = """
import time
began = time.monotonic()
for number in range(1, COUNT + 1):
    print(f"[a1 r0 #{number}] " + "x" * 1500, flush=number % 50 == 0)
    time.sleep(max(0, began + number / 1000 - time.monotonic()))
"""


def test_a_thousand_lines_a_second_come_whole_through_rotations(space: Cluster, command: Callable[..., str]) -> None:
    """A node keeps 10 MiB of a log in one file and looks every ten seconds; this is more than three of them."""
    count = 25_000
    run_id = command("speaker", "-c", SPEAKER.replace("COUNT", str(count)))
    lines = list(KubernetesBackend(space.api).logs(run_id, True, 0))
    assert [line.number for line in lines] == list(range(1, count + 1))
