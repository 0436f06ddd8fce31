"""A node that a launcher found unfit (44) sees no pod of the run again, once somebody has sent or resumed it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_api import FakeApi
from objects import APIS, condition, ended, pod
from profiles import KINDS, RUN, pods_of, profile

from orchestrator.cluster.job import JobSpec
from orchestrator.cluster.kubernetes import lifecycle, submit
from orchestrator.cluster.kubernetes.api import Api
from orchestrator.cluster.kubernetes.backend import KubernetesBackend
from orchestrator.cluster.kubernetes.lifecycle import objects_of, suspend
from orchestrator.cluster.kubernetes.runs import get_run
from orchestrator.options import JobKind, Spread

CORE = "/api/v1"
FAILED = {"conditions": [condition("Failed", "BackoffLimitExceeded")], "jobDeploymentStatus": "Failed"}
UNFIT = ended(44, "the GPU is lost")


@pytest.fixture
def spec(server: FakeApi, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    monkeypatch.setattr(submit, "PAUSE_S", 0.01)
    monkeypatch.setattr(lifecycle, "POLL_S", 0.01)
    for claim in ("runs", "data"):
        server.put(
            CORE, "persistentvolumeclaims", {"metadata": {"name": claim}, "spec": {"accessModes": ["ReadWriteMany"]}}
        )
    return profile("cpu2")


def send(api: Api, spec: JobSpec, kind: JobKind = JobKind.job) -> submit.Submission:
    return submit.submit(api, replace(spec, kind=kind))


def fail(server: FakeApi, *pods: dict[str, Any], kind: JobKind = JobKind.job) -> None:
    """As the cluster leaves a run that has no restart left, with these pods of its last attempt."""
    names = [name for name in server.names("pods") if name.startswith(RUN)]
    for name in names:
        server.remove(CORE, "pods", name)
    for one in pods:
        server.put(CORE, "pods", one)
    plural = f"{kind.name}s"
    root = next(f"/apis/{api}" for name, api in APIS.items() if name.lower() == kind.name)
    server.change(root, plural, RUN, status=FAILED)


def avoided(api: Api) -> dict[str, list[str]]:
    """The nodes that each kind of pod of the run avoids, by the rules of the scheduler."""
    found: dict[str, list[str]] = {}
    for obj in objects_of(api, get_run(api, RUN)):
        for template in pods_of(obj):
            node = template["spec"].get("affinity", {}).get("nodeAffinity", {})
            terms = node.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
            rules = [rule for term in terms for rule in term["matchFields"]]
            assert all(rule["key"] == "metadata.name" and len(rule["values"]) == 1 for rule in rules)
            found[template["metadata"]["labels"]["app.kubernetes.io/component"]] = [rule["values"][0] for rule in rules]
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_resumed_run_avoids_the_node_that_failed_it_and_no_other(
    server: FakeApi, api: Api, spec: JobSpec, kind: JobKind, caplog: pytest.LogCaptureFixture
) -> None:
    send(api, spec, kind)
    before = objects_of(api, get_run(api, RUN))
    lost_peer = pod(1, "Failed", name=RUN, node="rig-a", state=ended(75, "a peer is gone"))
    fail(server, pod(0, "Failed", name=RUN, node="rig-b", state=UNFIT), lost_peer, kind=kind)
    KubernetesBackend(api).resume(RUN)
    assert avoided(api)["node"] == ["rig-b"]
    assert {name: nodes for name, nodes in avoided(api).items() if name != "node" and nodes} == {}
    assert f"run {RUN} avoids rig-b, which a launcher found unfit" in caplog.text
    after = objects_of(api, get_run(api, RUN))
    for template in (template for objects in (before, after) for obj in objects for template in pods_of(obj)):
        template["spec"].pop("affinity", None)
    assert after == before, "nothing else changed"


@pytest.mark.parametrize("again", ["resume", "send"])
def test_what_an_earlier_life_avoided_is_not_forgotten(server: FakeApi, api: Api, spec: JobSpec, again: str) -> None:
    send(api, spec)
    for node in ("rig-c", "rig-b"):
        fail(server, pod(0, "Failed", name=RUN, node=node, state=UNFIT))
        KubernetesBackend(api).resume(RUN) if again == "resume" else send(api, spec)
    assert avoided(api) == {"node": ["rig-b", "rig-c"]}
    fail(server, pod(0, "Failed", name=RUN, node="rig-a", state=ended(1, "a bug")))
    KubernetesBackend(api).resume(RUN) if again == "resume" else send(api, spec)
    assert avoided(api) == {"node": ["rig-b", "rig-c"]}


@pytest.mark.parametrize("again", ["resume", "send"])
def test_a_stopped_run_goes_on_elsewhere_where_one_of_its_pods_found_its_node_unfit(
    server: FakeApi, api: Api, spec: JobSpec, again: str
) -> None:
    """A Job keeps the pods that it has replaced, and its template cannot change any more."""
    send(api, spec)
    uid = get_run(api, RUN).uid
    server.put(CORE, "pods", pod(0, "Failed", name=RUN, node="rig-b", state=UNFIT))
    suspend(api, get_run(api, RUN), now=False)
    KubernetesBackend(api).resume(RUN) if again == "resume" else send(api, spec)
    assert (avoided(api), get_run(api, RUN).uid == uid) == ({"node": ["rig-b"]}, False)
    uid = get_run(api, RUN).uid
    suspend(api, get_run(api, RUN), now=False)
    KubernetesBackend(api).resume(RUN) if again == "resume" else send(api, spec)
    assert get_run(api, RUN).uid == uid, "it is warned already"


def test_a_rule_of_the_user_s_own_stays(server: FakeApi, api: Api, spec: JobSpec) -> None:
    send(api, replace(spec, spread=Spread.pack))
    fail(server, pod(0, "Failed", name=RUN, node="rig-b", state=UNFIT))
    KubernetesBackend(api).resume(RUN)
    assert set(get_run(api, RUN).run["spec"]["template"]["spec"]["affinity"]) == {"nodeAffinity", "podAffinity"}
