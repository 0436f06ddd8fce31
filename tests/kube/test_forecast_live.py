"""What `plan` says of a run is what scheduler, quota and queue then do with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from administrator import rig_script, standing
from forecasts import CASES, POOLS, Case, Made
from launching import Cli, WarmServer, wait_for
from live import TRAIN, Cluster

from orchestrator.cluster.kubernetes.resources import POD, RUN, WORKLOAD
from orchestrator.cluster.kubernetes.survey import survey
from orchestrator.errors import OrchestratorError

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(240)]
QUIET_S = 6.0
"""After which a run that nothing starts is taken for one that does not start."""


@pytest.fixture(scope="module")
def pools(space: Cluster) -> None:
    """Simulated nodes, which stay: pods on them run without a process."""
    rig = rig_script()
    if rig is None:
        pytest.skip("NO SIMULATED NODES: only the rig's own cluster has them")
    for pool, (count, gpus, cpus, gib) in POOLS.items():
        words = ["fake", count, "--pool", pool, "--gpus", gpus, "--cpus", cpus, "--memory-gib", gib]
        subprocess.run([sys.executable, str(rig), *words], check=True)


@pytest.fixture(scope="module")
def admin(space: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmServer]:
    """Commands with the rights of whoever runs the cluster: a planner reads nodes and queues."""
    warm = WarmServer(tmp_path_factory.mktemp("admin"), [])
    yield warm
    warm.close()


def overrides_of(case: Case, cluster: Cluster, name: str) -> list[str]:
    words = [*TRAIN, *cluster.overrides("job", name), "cluster.code=image", *case.run, f"name={name}"]
    return [word.replace("QUEUE", name).replace("NAME", name) for word in words]


def objects_of(made: Made, cluster: Cluster) -> Made:
    text = json.dumps([obj for _, obj in made]).replace('"IMAGE"', json.dumps(cluster.image))
    return list(zip((kind for kind, _ in made), json.loads(text), strict=True))


def settle(cluster: Cluster, made: Made) -> None:
    """Until quotas count what is there and holders lie on their nodes."""
    for kind, obj in made:
        if kind is POD:
            name = obj["metadata"]["name"]
            wait_for(lambda name=name: cluster.api.get(POD, name)["status"].get("phase") == "Running", name, 30)
    time.sleep(1.5)


def started(cluster: Cluster, run_id: str, count: int) -> bool:
    pods = cluster.api.list(POD, f"{RUN}={run_id}")[0]
    return sum(bool(pod["spec"].get("nodeName")) for pod in pods) >= count


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_plan_comes_true(case: Case, pools: None, space: Cluster, admin: WarmServer, tmp_path: Path) -> None:
    if case.layer == "queue" and not space.api.serves(WORKLOAD):
        pytest.skip("NOT SERVED: the cluster has no Kueue")
    cli, name = Cli(admin, tmp_path, ()), f"case-{uuid.uuid4().hex[:6]}"
    words = overrides_of(case, space, name)
    around, blockers = (objects_of(made(name), space) for made in (case.around, case.blockers))
    holds = [one for one in words if one.startswith("compute.num_nodes=")][-1]
    count = int(holds.partition("=")[2])
    with standing(space.api, around):
        with standing(space.api, blockers):
            settle(space, [*around, *blockers])
            keep_snapshot(space, name, case, words)
            planned = cli("plan", "train", *words, "--json")
            assert planned.code in (0, 42), planned.err
            facts = planned.json()["cluster"]
            layer = [one["verdict"] for one in facts["layers"] if one["layer"] == case.layer]
            assert case.verdict in layer, facts
            assert facts["verdict"] == case.verdict, facts
            assert planned.code == (42 if case.verdict == "never" else 0)
            sent = cli("train", *words, "--json")
            run_id = sent.json()["run_id"] if sent.code == 0 else None
            try:
                watch(case, space, run_id, count)
            except BaseException:
                remove(cli, space, run_id)
                raise
        if case.blockers(name):
            assert run_id is not None
            wait_for(lambda: started(space, run_id, count), "the run to start once the way is free", 90)
        remove(cli, space, run_id)


def watch(case: Case, cluster: Cluster, run_id: str | None, count: int) -> None:
    """Whether the cluster does as planned."""
    if case.verdict == "fits":
        assert run_id is not None
        wait_for(lambda: started(cluster, run_id, count), "the run to start", 60)
        return
    until = time.monotonic() + QUIET_S
    while run_id is not None and time.monotonic() < until:
        assert not started(cluster, run_id, count), f"{case.verdict} was planned, and it started"
        time.sleep(0.5)


def remove(cli: Cli, cluster: Cluster, run_id: str | None) -> None:
    if run_id is None:
        return
    with suppress(OrchestratorError):
        cli("cancel", run_id, *cluster.verbs, "--now")
    removed = cli("rm", run_id, *cluster.verbs)
    assert removed.code == 0, removed.err


def keep_snapshot(cluster: Cluster, name: str, case: Case, words: list[str]) -> None:
    """Where $KEEP_SNAPSHOTS says so: the case as it can be replayed without a cluster."""
    folder = os.environ.get("KEEP_SNAPSHOTS")
    if not folder:
        return
    label = next(key for key, one in CASES.items() if one is case)
    kept = {
        "overrides": words,
        "verdict": case.verdict,
        "layer": case.layer,
        "snapshot": survey(cluster.api, None).facts(),
    }
    text = json.dumps(kept, indent=1, sort_keys=True).replace(name, "case").replace(cluster.api.namespace, "training")
    (Path(folder) / f"{label.replace(' ', '_').replace(',', '')}.json").write_text(text + "\n")
