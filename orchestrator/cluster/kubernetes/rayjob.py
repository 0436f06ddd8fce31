"""A run as a RayJob: KubeRay makes a Ray cluster for it, whose head starts the driver.

Restarts are counted by the driver. KubeRay's own ones, each on a new cluster, are for a driver that is gone.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from math import ceil
from typing import Any

from orchestrator.cluster.job import DRIVER, END_S, LEAST_SHM, RUN_FOLDER, JobSpec, Resources, command_of
from orchestrator.cluster.kubernetes.pod import Part, pod
from orchestrator.cluster.ray import kuberay
from orchestrator.cluster.ray.leave import LEAVE
from orchestrator.errors import ConfigError

OBJECT_STORE_BYTES = 256 << 20
"""Of each node's /dev/shm, besides what the loaders take: the driver and its workers exchange small objects only."""
OPERATOR = {
    "from": [
        {
            "namespaceSelector": {},
            "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}},
        }
    ]
}
"""KubeRay asks the head how the run is."""


def slots(spec: JobSpec) -> dict[str, Any]:
    """What the template needs besides the head of every object."""
    small = _one_process(spec)
    leave = (spec.python, "-m", DRIVER, LEAVE, f"{RUN_FOLDER}/run.json")
    head = Part("head", "ray-head", (), _env(_of_head(spec)), _with_store(small), pre_stop=leave)
    worker = Part("node", "ray-worker", (), _env(_of_worker(spec)), _with_store(spec.resources), pre_stop=leave)
    return {
        "entrypoint": f"exec {shlex.join(command_of(spec.python, DRIVER))}",  # no shell stays to take the signals
        "backoff_limit": spec.max_restarts,
        "submitter_pod": pod(_bare(spec), Part("submitter", "ray-job-submitter", (), (), small)),
        "ray_version": _ray_version(spec),
        "head_params": {"dashboard-host": "0.0.0.0", **_params(0, 0)},
        "head_pod": pod(spec, head),
        "num_nodes": spec.num_nodes,
        "worker_params": _params(spec.processes_per_node, spec.resources.gpus),
        "worker_pod": pod(spec, worker),
    }


def _of_head(spec: JobSpec) -> dict[str, str]:
    """A stopped job may save. The head itself waits for nothing: the driver has ended before it."""
    wait_s = str(ceil(spec.grace_s + END_S))
    return {kuberay.VARIABLE: "1", "RAY_JOB_STOP_WAIT_TIME_S": wait_s, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}


def _of_worker(spec: JobSpec) -> dict[str, str]:
    """From the drain on nothing new starts on the node, while its ranks save."""
    return {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(ceil(spec.grace_s))}


def _env(variables: dict[str, str]) -> tuple[dict[str, str], ...]:
    return tuple({"name": name, "value": value} for name, value in variables.items())


def _params(cpus: int, gpus: int) -> dict[str, str]:
    """Of `ray start`; a process of the run takes one CPU as Ray counts them."""
    counts = {"num-cpus": cpus, "num-gpus": gpus, "object-store-memory": OBJECT_STORE_BYTES}
    return {name: str(count) for name, count in counts.items()}


def _one_process(spec: JobSpec) -> Resources:
    """What the head and the submitter get: they run Python, and train nothing."""
    whole, share = spec.resources, spec.processes_per_node
    memory = (whole.memory_bytes - whole.shm_bytes) // share + LEAST_SHM
    return replace(whole, cpus=whole.cpus / share, memory_bytes=memory, shm_bytes=LEAST_SHM, gpus=0, rdma=None)


def _bare(spec: JobSpec) -> JobSpec:
    """The submitter hands over a command and follows its log; it needs no file of the run."""
    return replace(spec, secrets=(), volumes=(), archive_digest=None)


def _with_store(resources: Resources) -> Resources:
    memory, shm = resources.memory_bytes + OBJECT_STORE_BYTES, resources.shm_bytes + OBJECT_STORE_BYTES
    return replace(resources, memory_bytes=memory, shm_bytes=shm)


def _ray_version(spec: JobSpec) -> str:
    """KubeRay chooses its probes and the authentication by it."""
    version = spec.bundle["versions"].get("ray", "missing")
    if version == "missing":
        rule = "needs Ray where the run is submitted, so that the cluster gets the same version"
        raise ConfigError("cluster.kind", "rayjob", rule, "install ray, or cluster.kind=jobset")
    return version
