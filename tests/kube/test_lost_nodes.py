"""A node that is gone with all it held costs a run some seconds and no bit; on the rig, whose nodes can be killed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from administrator import Machines, rig_script
from live import Cluster, Live

from orchestrator.cluster.kubernetes.pods import index_of, is_running
from orchestrator.cluster.kubernetes.resources import JOB, JOBSET

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
KINDS = {"job": JOB, "jobset": JOBSET}
LONG = ("recipe.epochs=80", "seed=3")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, data: Cluster) -> str:
    if not data.api.serves(KINDS[request.param]):
        pytest.skip(f"NOT SERVED: the cluster knows no {request.param}")
    return request.param


@pytest.fixture
def machines(data: Cluster) -> Machines:
    rig = rig_script()
    if rig is None:
        pytest.skip("NO RIG: the nodes of this cluster cannot be killed")
    return Machines(data.api, rig)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("index", [0, 1])
def test_a_run_whose_node_is_lost_ends_in_the_same_bits(
    submit: Callable[..., Live], machines: Machines, local_weights: Callable[..., str], index: int
) -> None:
    weights = local_weights(*LONG)
    live = submit(*LONG)
    live.wait(lambda facts: (facts["step"] or 0) > 10, "ten steps")
    (victim,) = [pod for pod in live.pods() if index_of(pod) == index and is_running(pod)]
    lost = victim["spec"]["nodeName"]
    with machines.lost(lost):
        facts = live.end(300)
        assert facts["attempt"] >= 2
        nodes = {pod["spec"]["nodeName"] for pod in live.pods() if pod["status"]["phase"] == "Succeeded"}
        assert nodes
        assert lost not in nodes
    assert live.weights() == weights
