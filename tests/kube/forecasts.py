"""Cases in which a cluster takes a run, lets it wait or never starts it: written down before it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from administrator import CLUSTER_QUEUE, FLAVOR

from orchestrator.cluster.kubernetes.inventory import LIMIT_RANGE, RESOURCE_QUOTA
from orchestrator.cluster.kubernetes.resources import CLAIM, POD, PRIORITY, QUEUE, QUEUE_PRIORITY, Resource

Object = dict[str, Any]
Made = list[tuple[Resource, Object]]
GPU = "nvidia.com/gpu"
POOLS = {"roomy": ("3", "8", "32", "128"), "small": ("2", "4", "8", "16"), "plain": ("3", "0", "8", "32")}
"""Simulated nodes, one in each of three zones: how many, GPUs, CPUs, GiB."""
PLAIN = ("cluster.disk_gib=0", "compute.num_processes=2", "compute.num_nodes=2",
         "cluster.node_selector=['rig/pool=plain']",
         "cluster.tolerations=['rig/fake:NoSchedule']", "cluster.spread=any",
         "cluster.memory_gib_per_process=1", "cluster.cpus_per_process=2")  # fmt: skip
GPUS = ("cluster.disk_gib=0", "compute=gpu", "compute.num_processes=16", "compute.num_nodes=2", "cluster.spread=any",
        "recipe.global_batch_size=64", "cluster.cpus_per_process=0.5", "cluster.memory_gib_per_process=1")  # fmt: skip
ROOMY = (*GPUS, "cluster.node_selector=['rig/pool=roomy']")
QUEUED = (*PLAIN, "cluster.queue=QUEUE")


@dataclass(frozen=True)
class Case:
    """What stands in the way, what `plan` must say of it, and what may be taken away so that the run starts."""

    verdict: str
    layer: str
    run: tuple[str, ...]
    around: Callable[[str], Made] = lambda name: []
    """Objects that are there all the time, by a name of their own."""
    blockers: Callable[[str], Made] = lambda name: []
    """For WAITS: when they are gone the run must start."""


def quota(**hard: str) -> Callable[[str], Made]:
    names = {key.replace("__", "/").replace("_", "."): value for key, value in hard.items()}
    return lambda name: [(RESOURCE_QUOTA, {"metadata": {"name": name}, "spec": {"hard": names}})]


def limits(kind: str = "Container", **rules: Object) -> Callable[[str], Made]:
    spec = {"limits": [{"type": kind, **rules}]}
    return lambda name: [(LIMIT_RANGE, {"metadata": {"name": name}, "spec": spec})]


def holders(cpu: str, count: int = 1, pool: str = "plain", **spec: Any) -> Callable[[str], Made]:
    """Pods that hold CPUs of a pool."""

    def made(name: str) -> Made:
        return [(POD, _holder(f"{name}-{cpu}-{number}", cpu, pool, spec)) for number in range(count)]

    return made


def _holder(name: str, cpu: str, pool: str, spec: Object) -> Object:
    secured = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {"name": "holder", "image": "IMAGE", "command": ["sleep", "1000"], "securityContext": secured,
                 "resources": {"requests": {"cpu": cpu}}}  # fmt: skip
    pod = {
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "tolerations": [{"operator": "Exists"}],
        "nodeSelector": {"rig/pool": pool},
        "terminationGracePeriodSeconds": 0,
        "containers": [container],
        **spec,
    }
    return {"metadata": {"name": name}, "spec": pod}


def queue(quotas: Object | None = None, **spec: Any) -> Callable[[str], Made]:
    """A queue of one flavor for every namespace; a quota may be an object with its limits."""

    def made(name: str) -> Made:
        given = {"cpu": "8", "memory": "64Gi", "ephemeral-storage": "64Gi", **(quotas or {})}
        return [_flavor(name, {}), *_queue(name, given, {**spec, **_cohort(name, spec)}), _local(name)]

    return made


def _cohort(name: str, spec: Object) -> Object:
    return {"cohort": f"{name}-cohort"} if "cohort" in spec else {}


def _flavor(name: str, spec: Object) -> tuple[Resource, Object]:
    return FLAVOR, {"metadata": {"name": name}, "spec": spec}


def _queue(name: str, quotas: Object, spec: Object, flavor: str | None = None) -> Made:
    resources = [{"name": key, **(value if isinstance(value, dict) else {"nominalQuota": value})}
                 for key, value in quotas.items()]  # fmt: skip
    part = {"coveredResources": list(quotas), "flavors": [{"name": flavor or name, "resources": resources}]}
    return [
        (
            CLUSTER_QUEUE,
            {"metadata": {"name": name}, "spec": {"namespaceSelector": {}, "resourceGroups": [part], **spec}},
        )
    ]


def _local(name: str) -> tuple[Resource, Object]:
    return QUEUE, {"metadata": {"name": name}, "spec": {"clusterQueue": name}}


def with_neighbour(own: Callable[[str], Made], **quotas: Any) -> Callable[[str], Made]:
    """Beside a queue of its cohort."""

    def made(name: str) -> Made:
        given = {"cpu": "8", "memory": "64Gi", "ephemeral-storage": "64Gi", **quotas}
        return [*own(name), *_queue(f"{name}-other", given, {"cohort": f"{name}-cohort"}, flavor=name)]

    return made


def with_flavor(spec: Object) -> Callable[[str], Made]:
    def made(name: str) -> Made:
        return [(kind, {**obj, "spec": spec} if kind is FLAVOR else obj) for kind, obj in queue()(name)]

    return made


def unbound(name: str) -> Made:
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    return [(CLAIM, {"metadata": {"name": name}, "spec": {**spec, "storageClassName": "no-such-class"}})]


def classes(name: str) -> Made:
    return [(PRIORITY, {"metadata": {"name": f"{name}-high"}, "value": 1000})]


def both(*makers: Callable[[str], Made]) -> Callable[[str], Made]:
    return lambda name: [one for maker in makers for one in maker(name)]


def queue_classes(name: str) -> Made:
    return [(QUEUE_PRIORITY, {"metadata": {"name": f"{name}-high"}, "value": 1000})]


SECOND = "cluster.volumes=[{claim: runs, path: /runs, read_only: false}, {claim: NAME, path: /more, read_only: true}]"
CASES: dict[str, Case] = {
    # nodes
    "two pods on a pool with room": Case("fits", "nodes", PLAIN),
    "two nodes of eight GPUs": Case("fits", "nodes", ROOMY),
    "eight GPUs on nodes of four": Case("never", "nodes", (*GPUS, "cluster.node_selector=['rig/pool=small']")),
    "four nodes of a pool of three": Case(
        "never", "nodes", (*ROOMY, "compute.num_nodes=4", "compute.num_processes=32")
    ),
    "more memory than any node has": Case("never", "nodes", (*PLAIN, "cluster.memory_gib_per_process=200")),
    "more CPUs than any node has": Case("never", "nodes", (*PLAIN, "cluster.cpus_per_process=9")),
    "a taint that is not tolerated": Case("never", "nodes", (*PLAIN, "cluster.tolerations=[]")),
    "a label that no node has": Case("never", "nodes", (*PLAIN, "cluster.node_selector=['rig/pool=none']")),
    "a full pool": Case("waits", "nodes", PLAIN, blockers=holders("7", 3)),
    "a pool with room for one of two": Case("waits", "nodes", PLAIN, blockers=both(holders("7", 2), holders("5"))),
    "pods that must lie apart, by host": Case("fits", "nodes", (*PLAIN, "cluster.spread=spread")),
    "pods that must lie apart, and one host is full": Case(
        "waits", "nodes", (*PLAIN, "cluster.spread=spread", "compute.num_nodes=6", "compute.num_processes=6"),
        blockers=holders("7"),
    ),
    "pods that must lie in one zone": Case(
        "fits", "nodes", (*PLAIN, "cluster.spread=pack", "cluster.topology=topology.kubernetes.io/zone")
    ),
    "pods that must lie in one zone and do not": Case(
        "never", "nodes",
        (*PLAIN, "cluster.spread=pack", "cluster.topology=topology.kubernetes.io/zone", "cluster.cpus_per_process=5"),
    ),
    "lower priorities give way": Case(
        "fits", "nodes", (*PLAIN, "cluster.priority=NAME-high"), around=both(classes, holders("7", 3))
    ),
    # quota and limits
    "within the quota": Case("fits", "quota", PLAIN, quota(requests_cpu="4", pods="2")),
    "a quota of CPUs that is too small": Case("never", "quota", PLAIN, quota(requests_cpu="3")),
    "a quota of memory limits that is too small": Case("never", "quota", PLAIN, quota(limits_memory="1Gi")),
    "a quota of pods that is too small": Case("never", "quota", PLAIN, quota(pods="1")),
    "a quota of GPUs that is too small": Case("never", "quota", ROOMY, quota(**{"requests_nvidia_com/gpu": "8"})),
    "a quota that counts CPU limits": Case("never", "quota", PLAIN, quota(limits_cpu="100")),
    "a quota that others fill": Case("waits", "quota", PLAIN, quota(requests_cpu="5"), holders("4")),
    "a quota of config maps that is full": Case("never", "quota", PLAIN, quota(**{"count/configmaps": "0"})),
    "within the limits": Case("fits", "limit range", PLAIN, limits(max={"memory": "4Gi"})),
    "a limit of memory below the run's": Case("never", "limit range", PLAIN, limits(max={"memory": "512Mi"})),
    "a least request above the run's": Case("never", "limit range", PLAIN, limits(min={"cpu": "3"})),
    "a default limit below the request": Case("never", "limit range", PLAIN, limits(default={"cpu": "1"})),
    "a limit for whole pods": Case("never", "limit range", PLAIN, limits("Pod", max={"memory": "512Mi"})),
    # Kueue
    "a queue with room": Case("fits", "queue", QUEUED, queue()),
    "a queue that is too small": Case("never", "queue", QUEUED, queue({"cpu": "3"})),
    "a queue without quota for GPUs": Case("never", "queue", (*ROOMY, "cluster.queue=QUEUE"), queue({"cpu": "64"})),
    "a queue without quota for disk": Case(
        "never", "queue", (*QUEUED, "cluster.disk_gib=1"), lambda name: [
            (kind, _without_disk(obj)) if kind is CLUSTER_QUEUE else (kind, obj) for kind, obj in queue()(name)
        ],
    ),
    "a queue that borrows": Case(
        "fits", "queue", QUEUED, with_neighbour(queue({"cpu": "3"}, cohort=True))
    ),
    "a queue that may borrow too little": Case(
        "never", "queue", QUEUED,
        with_neighbour(queue({"cpu": {"nominalQuota": "2", "borrowingLimit": "1"}}, cohort=True)),
    ),
    "a neighbour that lends nothing": Case(
        "never", "queue", QUEUED,
        with_neighbour(queue({"cpu": "3"}, cohort=True), cpu={"nominalQuota": "8", "lendingLimit": "0"}),
    ),
    "a queue on hold": Case("waits", "queue", QUEUED, queue(stopPolicy="Hold")),
    "a flavor whose taint is not tolerated": Case(
        "never", "queue", QUEUED,
        with_flavor({"nodeTaints": [{"key": "special", "value": "yes", "effect": "NoSchedule"}]}),
    ),
    "a queue for other namespaces": Case(
        "never", "queue", QUEUED, queue(namespaceSelector={"matchLabels": {"team": "others"}})
    ),
    # what the run refers to
    "a claim that nothing can bind": Case("never", "presence", (*PLAIN, SECOND), unbound),
    "a claim that is not there": Case("never", "presence", (*PLAIN, SECOND)),
    "a secret that is not there": Case(
        "never", "presence", (*PLAIN, "tracking=online", "tracking.secret=no-such-secret/key")
    ),
    # the server
    "RDMA in a restricted namespace": Case("never", "pod security", (*ROOMY, "cluster.rdma=rdma/hca")),
}  # fmt: skip


def _without_disk(obj: Object) -> Object:
    (part,) = obj["spec"]["resourceGroups"]
    (flavor,) = part["flavors"]
    kept: Sequence[Object] = [one for one in flavor["resources"] if one["name"] != "ephemeral-storage"]
    less = {"coveredResources": [one["name"] for one in kept], "flavors": [{**flavor, "resources": kept}]}
    return {**obj, "spec": {**obj["spec"], "resourceGroups": [less]}}


EIGHT = (
    "two pods on a pool with room", "eight GPUs on nodes of four", "a full pool", "a quota of CPUs that is too small",
    "within the limits", "a queue with room", "a queue that is too small", "a claim that is not there",
)  # fmt: skip
"""Those that every change must pass."""
