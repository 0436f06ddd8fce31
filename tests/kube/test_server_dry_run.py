"""The server of a real cluster takes every manifest, pods included, and refuses broken ones; it keeps none of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from administrator import post, standing
from launching import wait_for
from live import Cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster" / "kubernetes"))

from profiles import KINDS, PROFILES, pods_of, profile

from orchestrator.cluster.job import JobSpec
from orchestrator.cluster.kubernetes.api import Api, Object, connect
from orchestrator.cluster.kubernetes.failures import Refused
from orchestrator.cluster.kubernetes.inventory import NAMESPACE
from orchestrator.cluster.kubernetes.pull import reader_job
from orchestrator.cluster.kubernetes.render import render
from orchestrator.cluster.kubernetes.resources import (
    ACCOUNT,
    JOB,
    POD,
    PRIORITY,
    TRAINING_RUNTIME,
    Resource,
    resource_of,
)  # fmt: skip
from orchestrator.cluster.kubernetes.resources import (
    KINDS as RESOURCES,
)
from orchestrator.errors import UserError
from orchestrator.options import JobKind

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
LEVEL = "pod-security.kubernetes.io/enforce"


@pytest.fixture(scope="module")
def restricted(space: Cluster) -> Iterator[Api]:
    """A namespace as k8s/base makes it, with what the profiles name that a server looks for at once."""
    account = (ACCOUNT, {"metadata": {"name": "runner"}})
    with standing(space.api, [account, (PRIORITY, {"metadata": {"name": "batch"}, "value": 10})]):
        yield space.api


@pytest.fixture(scope="module")
def privileged(restricted: Api) -> Iterator[Api]:
    """Where runs with RDMA go."""
    name = f"{restricted.namespace}-rdma"
    with standing(restricted, [(NAMESPACE, {"metadata": {"name": name, "labels": {LEVEL: "privileged"}}})]):
        yield connect(namespace=name)


def send(api: Api, obj: Object, resource: Resource | None = None) -> Object:
    """What the server would keep. Raises what it refuses, fields that it does not know included."""
    return post(api, resource or resource_of(obj), obj, dryRun="All", fieldValidation="Strict")


def send_all(api: Api, objects: list[Object]) -> int:
    """A run's objects and each of its pods; returns how many of those there are."""
    *parts, run = objects
    for part in parts:
        send(api, part)
    with standing(api, runtimes_in(parts)):
        wait_for(lambda: seen(api, run), "the operator to see the runtime", 10)
    pods = list(pods_of(objects))
    for pod in pods:
        send_pod(api, pod)
    return len(pods)


def seen(api: Api, run: Object) -> bool:
    """False while Trainer does not know the new runtime of a run."""
    try:
        send(api, run)
    except Refused as error:
        if "must be created before" not in str(error):
            raise
        return False
    return True


def runtimes_in(objects: list[Object]) -> list[tuple[Resource, Object]]:
    """What must be there before a TrainJob is judged."""
    return [(TRAINING_RUNTIME, obj) for obj in objects if obj["kind"] == "TrainingRuntime"]


def send_pod(api: Api, pod: Object) -> None:
    """Controllers make pods, so only this shows what the admission of pods says."""
    send(api, {**pod, "metadata": {**pod.get("metadata", {}), "generateName": "dry-run-"}}, POD)


def served(api: Api, kind: JobKind) -> None:
    if not api.serves(RESOURCES[kind]):
        pytest.skip(f"NOT SERVED: the cluster knows no {kind.name}")


def rendered(spec: JobSpec, kind: JobKind) -> list[Object]:
    return render(spec, kind, b"an archive" if spec.archive_digest else None)


def without_rdma(spec: JobSpec) -> JobSpec:
    return replace(spec, resources=replace(spec.resources, rdma=None))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", PROFILES)
def test_a_restricted_namespace_takes_all_objects_and_pods_of_a_run(restricted: Api, kind: JobKind, name: str) -> None:
    served(restricted, kind)
    objects = rendered(without_rdma(profile(name)), kind)
    assert send_all(restricted, objects) == (3 if kind is JobKind.rayjob else 1)
    assert restricted.find(RESOURCES[kind], objects[-1]["metadata"]["name"]) is None, "nothing was kept"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_only_a_privileged_namespace_takes_pods_with_rdma(restricted: Api, privileged: Api, kind: JobKind) -> None:
    served(restricted, kind)
    objects = rendered(profile("gpu_queue_spot_rdma"), kind)
    send_all(privileged, objects)
    trains = next(pod for pod in pods_of(objects) if "IPC_LOCK" in str(pod))
    with pytest.raises(Refused, match=r"PodSecurity.*IPC_LOCK.*Way out: a namespace that allows this"):
        send_pod(restricted, trains)


@pytest.mark.parametrize("name", PROFILES)
def test_a_restricted_namespace_takes_the_pod_that_reads_a_folder(restricted: Api, name: str) -> None:
    (template,) = pods_of(rendered(without_rdma(profile(name)), JobKind.job))
    job = reader_job("pull-x-1", template, "/runs/x", {})
    send(restricted, job, JOB)
    send_pod(restricted, job["spec"]["template"])


def at(*path: Any) -> Callable[[Object, Any], None]:
    """Sets a value deep in an object."""

    def spoil(obj: Object, value: Any) -> None:
        *way, last = path
        for key in way:
            obj = obj[key]
        obj[last] = value

    return spoil


BROKEN = [
    (JobKind.job, at("spec", "parallelism"), -1, "greater than or equal to 0"),
    (JobKind.job, at("spec", "paralelism"), 2, "unknown field"),
    (JobKind.job, at("spec", "template", "spec", "restartPolicy"), "Always", "restartPolicy"),
    (JobKind.jobset, at("spec", "replicatedJobs", 0, "name"), "No_Name", "No_Name"),
    (JobKind.jobset, at("spec", "failurePolicy", "rules", 0, "action"), "Shrug", "Unsupported value|supported values"),
    (JobKind.trainjob, at("spec", "trainer", "numNodes"), "two", "numNodes"),
    (JobKind.trainjob, at("spec", "runtimeRef", "name"), "nothing", "nothing"),
    (JobKind.rayjob, at("spec", "backoffLimit"), "never", "backoffLimit"),
    (JobKind.rayjob, at("spec", "rayClusterSpec", "workerGroups"), [], "unknown field"),
]


@pytest.mark.parametrize(("kind", "spoil", "value", "said"), BROKEN, ids=lambda value: getattr(value, "name", None))
def test_a_broken_manifest_is_refused(
    restricted: Api, kind: JobKind, spoil: Callable[[Object, Any], None], value: Any, said: str
) -> None:
    served(restricted, kind)
    objects = rendered(profile("cpu2"), kind)
    spoil(objects[-1], value)
    with standing(restricted, runtimes_in(objects)), pytest.raises(UserError, match=said):
        send(restricted, objects[-1])


def test_a_pod_that_is_not_restricted_is_refused(restricted: Api) -> None:
    (pod,) = pods_of(rendered(profile("cpu2"), JobKind.job))
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(Refused, match=r"PodSecurity.*allowPrivilegeEscalation"):
        send_pod(restricted, pod)
