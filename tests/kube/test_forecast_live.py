"""What `plan` says of a run is what scheduler, quota and queue then do with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from administrator import NODE, rig_script, standing
from forecasts import CASES, EIGHT, POOLS, Case, Made
from launching import wait_for
from live import TRAIN, Cluster

from orchestrator.bundle import Bundle, freeze
from orchestrator.cli.outlook import look_ahead
from orchestrator.cluster.job import JobSpec, job_of
from orchestrator.cluster.kubernetes.lifecycle import erase
from orchestrator.cluster.kubernetes.render import render
from orchestrator.cluster.kubernetes.resources import POD, RUN, WORKLOAD
from orchestrator.cluster.kubernetes.runs import find_run
from orchestrator.cluster.kubernetes.submit import submit
from orchestrator.cluster.kubernetes.survey import survey
from orchestrator.compose import compose
from orchestrator.errors import OrchestratorError
from orchestrator.options import JobKind

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(240)]
UNUSED = ("Event", "Job", "JobSet", "TrainJob", "RayJob", "RayCluster", "Service")
QUIET_S = 6.0
"""After which a run that nothing starts is taken for one that does not start."""


@pytest.fixture(scope="module")
def tag(space: Cluster) -> Iterator[str]:
    """Simulated nodes of this session alone, by the end of their pools' names; pods on them run without a process."""
    rig, tag = rig_script(), uuid.uuid4().hex[:4]
    if rig is None:
        pytest.skip("NO SIMULATED NODES: only the rig's own cluster has them")
    for pool, (count, gpus, cpus, gib) in POOLS.items():
        words = ["fake", count, "--pool", f"{pool}-{tag}", "--gpus", gpus, "--cpus", cpus, "--memory-gib", gib]
        subprocess.run([sys.executable, str(rig), *words], check=True)
    yield tag
    for pool, (count, *_) in POOLS.items():
        for number in range(int(count)):
            space.api.delete(NODE, f"{pool}-{tag}-{number}")


def overrides_of(case: Case, cluster: Cluster, name: str, tag: str) -> list[str]:
    words = [*TRAIN, *cluster.overrides("job", name), "cluster.code=image", *case.run, f"name={name}"]
    named = [word.replace("QUEUE", name).replace("NAME", name) for word in words]
    return [re.sub(r"rig/pool=(\w+)", rf"rig/pool=\1-{tag}", word) for word in named]


def objects_of(made: Made, cluster: Cluster, tag: str) -> Made:
    text = json.dumps([obj for _, obj in made]).replace('"IMAGE"', json.dumps(cluster.image))
    text = re.sub(r'"rig/pool": "(\w+)"', rf'"rig/pool": "\1-{tag}"', text)
    return list(zip((kind for kind, _ in made), json.loads(text), strict=True))


def settle(cluster: Cluster, made: Made) -> None:
    """Until quotas count what is there and holders lie on their nodes."""
    for kind, obj in made:
        if kind is POD:
            name = obj["metadata"]["name"]
            wait_for(lambda name=name: cluster.api.get(POD, name)["status"].get("phase") == "Running", name, 30)
    time.sleep(1.5)


def params() -> list[Any]:
    return [
        pytest.param(case, id=key, marks=[pytest.mark.landing] if key in EIGHT else []) for key, case in CASES.items()
    ]


@pytest.mark.parametrize("case", params())
def test_a_plan_comes_true(case: Case, tag: str, space: Cluster) -> None:
    if case.layer == "queue" and not space.api.serves(WORKLOAD):
        pytest.skip("NOT SERVED: the cluster has no Kueue")
    name = f"case-{uuid.uuid4().hex[:6]}"
    bundle = freeze(compose(overrides_of(case, space, name, tag)))
    around, blockers = (objects_of(made(name), space, tag) for made in (case.around, case.blockers))
    with standing(space.api, around):
        with standing(space.api, blockers):
            settle(space, [*around, *blockers])
            keep_snapshot(space, name, tag, case, bundle)
            found = look_ahead(bundle, [])
            said = "\n".join(f"{one.layer}: {one.verdict.name}: {one.said}" for one in found.findings)
            assert (case.layer, case.verdict) in [(one.layer, one.verdict.name) for one in found.findings], said
            assert found.verdict.name == case.verdict, said
            spec, is_sent = job_of(bundle, None), True
            try:
                submit(space.api, spec)
            except OrchestratorError:
                is_sent = False
            try:
                watch(case, space, spec, is_sent)
            except BaseException:
                remove(space, spec.run_id)
                raise
        if blockers:
            wait_for(lambda: has_started(space, spec), "the run to start once the way is free", 90)
        remove(space, spec.run_id)


def watch(case: Case, cluster: Cluster, spec: JobSpec, is_sent: bool) -> None:
    """Whether the cluster does as planned."""
    if case.verdict == "fits":
        assert is_sent
        wait_for(lambda: has_started(cluster, spec), "the run to start", 60)
        return
    until = time.monotonic() + QUIET_S
    while is_sent and time.monotonic() < until:
        assert not has_started(cluster, spec), f"{case.verdict} was planned, and it started"
        time.sleep(0.5)


def has_started(cluster: Cluster, spec: JobSpec) -> bool:
    """Whether every pod has its node."""
    pods = cluster.api.list(POD, f"{RUN}={spec.run_id}")[0]
    return sum(bool(pod["spec"].get("nodeName")) for pod in pods) >= spec.num_nodes


def remove(cluster: Cluster, run_id: str) -> None:
    found = find_run(cluster.api, run_id)
    if found is not None:
        for pod in cluster.api.list(POD, f"{RUN}={run_id}")[0]:
            cluster.api.delete(POD, pod["metadata"]["name"], grace_s=0)
        erase(cluster.api, found)


def slim(facts: dict[str, Any], tag: str) -> dict[str, Any]:
    """Without what `plan` does not look at, and without the simulated nodes of other sessions."""
    objects = {kind: found for kind, found in facts["objects"].items() if kind not in UNUSED}
    objects["Node"] = [
        {**node, "status": {"allocatable": node["status"]["allocatable"], "images": node["status"]["images"],
                            "conditions": [one for one in node["status"]["conditions"] if one["type"] == "Ready"]}}
        for node in objects["Node"]
        if "rig/pool" not in node["metadata"]["labels"] or tag in node["metadata"]["name"]
    ]  # fmt: skip
    kept = {node["metadata"]["name"] for node in objects["Node"]}
    objects["Pod"] = [pod for pod in objects["Pod"] if pod["spec"].get("nodeName") in kept]
    return {**facts, "objects": objects}


def keep_snapshot(cluster: Cluster, name: str, tag: str, case: Case, bundle: Bundle) -> None:
    """Where $KEEP_SNAPSHOTS says so: the case as it can be replayed without a cluster."""
    folder = os.environ.get("KEEP_SNAPSHOTS")
    if not folder:
        return
    label = next(key for key, one in CASES.items() if one is case)
    objects = [{**obj, "data": {}} if obj["kind"] == "ConfigMap" else obj
               for obj in render(job_of(bundle, None), JobKind.job)]  # fmt: skip
    taken = slim(survey(cluster.api, coming=objects).facts(), tag)
    kept = {"objects": objects, "verdict": case.verdict, "layer": case.layer, "snapshot": taken}
    text = (
        json.dumps(kept, sort_keys=True)
        .replace(name, "case")
        .replace(f"-{tag}", "")
        .replace(cluster.api.namespace, "training")
    )
    (Path(folder) / f"{label.replace(' ', '_').replace(',', '')}.json").write_text(text + "\n")
