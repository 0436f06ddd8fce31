"""Clusters as their API tells of them, made by hand: what a run meets, and changes to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from profiles import IMAGE, SHARED, VOLUMES, spec_of

from orchestrator.cluster.kubernetes.render import render
from orchestrator.cluster.snapshot import Snapshot
from orchestrator.options import JobKind

Object = dict[str, Any]
SPACE = "training"
NOW = "2026-01-01T12:00:00Z"
GPU = "nvidia.com/gpu"
NVIDIA = {"key": GPU, "value": "present", "effect": "NoSchedule"}
CPU_RUN = (*SHARED, VOLUMES, "compute=cpu2", "compute.num_nodes=2", "cluster.code=image", "cluster.spread=any",
           "cluster.cpus_per_process=4", "cluster.memory_gib_per_process=8")  # fmt: skip
GPU_RUN = (*SHARED, VOLUMES, "compute=gpu", "compute.num_nodes=2", "compute.num_processes=16", "cluster.code=image",
           "cluster.spread=any", "cluster.cpus_per_process=4", "cluster.memory_gib_per_process=8",
           "recipe.global_batch_size=256")  # fmt: skip


@cache
def _sent(kind: JobKind, *overrides: str) -> tuple[Object, ...]:
    return tuple(render(spec_of(*overrides), kind))


def sent(*overrides: str, kind: JobKind = JobKind.job) -> list[Object]:
    """What would be sent."""
    return copy.deepcopy(list(_sent(kind, *overrides)))


def node(name: str, cpu: int = 32, memory_gib: int = 128, gpus: int = 0, **spec: Any) -> Object:
    labels = {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": spec.pop("zone", "a")}
    room = {"cpu": str(cpu), "memory": f"{memory_gib}Gi", "ephemeral-storage": "500Gi", "pods": "110"}
    taints = spec.pop("taints", [NVIDIA] if gpus else [])
    status = {
        "allocatable": {**room, **({GPU: str(gpus)} if gpus else {})},
        "conditions": [{"type": "Ready", "status": spec.pop("ready", "True")}],
        "images": spec.pop("images", [{"names": [IMAGE]}]),
    }
    labels |= spec.pop("labels", {})
    return {"metadata": {"name": name, "labels": labels}, "spec": {"taints": taints, **spec}, "status": status}


def pod(name: str, where: str, phase: str = "Running", *, priority: int = 0, owner: str = "", cpu: str = "1") -> Object:
    meta: Object = {"name": name, "namespace": "other"}
    if owner:
        meta["ownerReferences"] = [{"kind": owner, "name": f"{name}-owner"}]
    spec = {
        "nodeName": where,
        "priority": priority,
        "containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}],
    }
    return {"metadata": meta, "spec": spec, "status": {"phase": phase, "startTime": "2026-01-01T09:00:00Z"}}


def healthy() -> Snapshot:
    """Room for both runs, all that they refer to, no quota, no queue; the submitter's rights."""
    verbs = ["create", "get", "list"]
    rule = {"apiGroups": ["*"], "resources": ["*"], "verbs": verbs}
    claims = [
        {"metadata": {"name": name}, "spec": {"storageClassName": "shared"}, "status": {"phase": "Bound"}}
        for name in ("runs", "data")
    ]
    objects: dict[str, Sequence[Object]] = {
        "Node": [node("a"), node("b"), node("g1", gpus=8), node("g2", gpus=8)],
        "Pod": [pod("dns", "a", owner="DaemonSet", cpu="1")],
        "Namespace": [{"metadata": {"name": SPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}],
        "PersistentVolumeClaim": claims,
        "Secret": [], "ConfigMap": [], "ServiceAccount": [], "ResourceQuota": [], "LimitRange": [], "LocalQueue": [],
        "PriorityClass": [], "StorageClass": [{"metadata": {"name": "shared"}, "provisioner": "example/nfs"}],
        "SelfSubjectRulesReview": [{"status": {"resourceRules": [rule]}}],
    }  # fmt: skip
    return Snapshot(NOW, "kubernetes", "https://cluster.example (test)", SPACE, None, objects)


def but(**kinds: Any) -> Callable[[], Snapshot]:
    """The healthy cluster with other objects of some kinds; None: that kind could not be read."""

    def made() -> Snapshot:
        base = healthy()
        objects = {**base.objects, **{kind: value for kind, value in kinds.items() if value is not None}}
        missing = {kind: f"no right to list {kind.lower()}s" for kind, value in kinds.items() if value is None}
        kept = {kind: value for kind, value in objects.items() if kind not in missing}
        return Snapshot(base.taken, base.cluster, base.place, SPACE, None, kept, missing)

    return made


def quota(**hard: str) -> Object:
    names = {key.replace("__", "/").replace("_", "."): value for key, value in hard.items()}
    return {"metadata": {"name": "team"}, "spec": {"hard": names}, "status": {"hard": names, "used": {}}}


def used(one: Object, **amounts: str) -> Object:
    names = {key.replace("__", "/").replace("_", "."): value for key, value in amounts.items()}
    return {**one, "status": {**one["status"], "used": names}}


def limit(kind: str = "Container", **rules: Object) -> Object:
    return {"metadata": {"name": "bounds"}, "spec": {"limits": [{"type": kind, **rules}]}}


def local_queue(name: str = "train", to: str = "team", **status: Any) -> Object:
    return {"metadata": {"name": name}, "spec": {"clusterQueue": to}, "status": status}


def cluster_queue(
    name: str = "team", nominal: Object | None = None, taken: Object | None = None, **spec: Any
) -> Object:
    """One flavor; `nominal` and `taken` by resource; a quota may be an object with its limits."""
    quotas = {"ephemeral-storage": "1Ti", **(nominal or {"cpu": "64", "memory": "256Gi"})}
    resources = [
        {"name": key, **(value if isinstance(value, dict) else {"nominalQuota": value})}
        for key, value in quotas.items()
    ]
    flavor = spec.pop("flavor", "default")
    group = {"coveredResources": list(quotas), "flavors": [{"name": flavor, "resources": resources}]}
    usage = [{"name": flavor, "resources": [{"name": key, "total": value} for key, value in (taken or {}).items()]}]
    return {
        "metadata": {"name": name},
        "spec": {"resourceGroups": [group], "namespaceSelector": {}, **spec},
        "status": {"flavorsReservation": usage, "conditions": [{"type": "Active", "status": "True"}]},
    }


def flavor(name: str = "default", **spec: Any) -> Object:
    return {"metadata": {"name": name}, "spec": spec}


def workload(name: str, priority: int = 0, admitted: Object | None = None) -> Object:
    """Waiting, or with what it uses of the one flavor."""
    status: Object = {"conditions": [{"type": "QuotaReserved", "status": "False"}]}
    if admitted:
        part = {"flavors": dict.fromkeys(admitted, "default"), "resourceUsage": admitted}
        status = {
            "conditions": [{"type": "QuotaReserved", "status": "True"}],
            "admission": {"clusterQueue": "team", "podSetAssignments": [part]},
        }
    meta = {"name": f"job-{name}", "creationTimestamp": "2026-01-01T10:00:00Z", "ownerReferences": [{"name": name}]}
    return {"metadata": meta, "spec": {"queueName": "train", "priority": priority, "active": True}, "status": status}
