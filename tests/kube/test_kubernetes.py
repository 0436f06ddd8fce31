"""The same run on a real cluster, by the commands of a user: it ends in the same bits, whatever happens to its pods."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from live import Cluster, Live

from orchestrator.cluster.kubernetes.backend import KubernetesBackend
from orchestrator.cluster.kubernetes.pods import index_of, is_running
from orchestrator.cluster.kubernetes.resources import POD

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
Submit = Callable[..., Live]
Local = Callable[..., str]
SHORT = ("recipe.epochs=4", "seed=1")
LONG = ("recipe.epochs=40", "seed=2")


def test_a_run_over_two_nodes_ends_in_the_bits_of_this_machine(submit: Submit, local_weights: Local) -> None:
    live = submit(*SHORT)
    followed = live.verb("logs", "-f", "--json")
    assert followed.code == 0, followed.err
    lines = [json.loads(line) for line in followed.out.splitlines()]
    assert {line["rank"] for line in lines} >= {0, 1}
    keys = [(line["attempt"], line["rank"], line["number"]) for line in lines if line["rank"] is not None]
    assert len(keys) == len(set(keys))
    facts = live.end()
    assert (facts["exit_code"], facts["attempt"], facts["restarts"]) == (0, 1, 0)
    assert len({pod["spec"]["nodeName"] for pod in live.pods()}) == 2
    assert live.weights() == local_weights(*SHORT)
    again = live.verb("logs", "--json")
    assert [json.loads(line) for line in again.out.splitlines() if '"rank": 0' in line] == [
        line for line in lines if line["rank"] == 0
    ]


def test_a_run_that_is_cancelled_and_resumed_ends_in_the_same_bits(submit: Submit, local_weights: Local) -> None:
    live = submit(*LONG)
    live.wait(lambda facts: (facts["step"] or 0) > 10, "ten steps")
    cancelled = live.verb("cancel")
    assert cancelled.code == 0, cancelled.err
    assert [pod for pod in live.pods() if is_running(pod)] == []
    assert live.facts()["state"] == "stopped"
    resumed = live.verb("resume")
    assert resumed.code == 0, resumed.err
    facts = live.end()
    assert facts["attempt"] == 2
    assert live.weights() == local_weights(*LONG)


@pytest.mark.parametrize("node", [0, 1])
def test_a_run_whose_pod_is_killed_ends_in_the_same_bits(submit: Submit, local_weights: Local, node: int) -> None:
    live = submit(*LONG)
    live.wait(lambda facts: (facts["step"] or 0) > 10, "ten steps")
    (victim,) = [pod for pod in live.pods() if index_of(pod) == node and is_running(pod)]
    live.cluster.api.delete(POD, victim["metadata"]["name"], grace_s=0)
    facts = live.end()
    assert facts["attempt"] >= 2
    assert live.weights() == local_weights(*LONG)


def test_every_rank_says_where_it_is(submit: Submit) -> None:
    live = submit(*LONG)
    live.wait(lambda facts: (facts["step"] or 0) > 10, "ten steps")
    answer = live.verb("stack", "--json")
    assert answer.code == 0, answer.err
    stacks = answer.json()
    assert sorted(stacks) == ["0", "1"]
    assert all(any("orchestrator/" in frame for frame in frames) for frames in stacks.values())


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
