"""A cluster on which a run of two pods trains well, and one change to it at a time; values as the real ones write them.

Kubernetes 1.37, Kueue 0.10, JobSet 0.10, Trainer 2.1, KubeRay 1.5: messages are those that their sources or the
cluster of the tests write.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from orchestrator.cluster.snapshot import Snapshot

Object = dict[str, Any]
Change = Callable[["World"], None]
RUN = "digits-0123abcd"
SPACE = "training"
GPU = "nvidia.com/gpu"
LABELS = {"app.kubernetes.io/name": "orchestrator", "orchestrator/run": RUN}
BEGAN, NOW = "2026-01-01T10:00:00Z", "2026-01-01T10:10:00Z"
IMAGE = "registry.example/train@sha256:0123"
ALL = (
    "Job", "JobSet", "TrainJob", "RayJob", "RayCluster", "Pod", "Event", "Workload", "LocalQueue", "ClusterQueue",
    "ResourceQuota", "LimitRange", "PersistentVolumeClaim", "Service", "ConfigMap", "Secret", "Node", "PriorityClass",
    "StorageClass", "Namespace",
)  # fmt: skip


class World:
    """Objects by kind; changes work on them in place."""

    def __init__(self) -> None:
        self.objects: dict[str, list[Object]] = {kind: [] for kind in ALL}
        self.missing: dict[str, str] = {}
        self.limits: dict[str, str] = {}
        self.record: dict[str, Any] = {}

    def add(self, kind: str, obj: Object) -> Object:
        self.objects[kind].append({"kind": kind, **obj})
        return self.objects[kind][-1]

    @property
    def run(self) -> Object:
        return self.objects["Job"][0]

    @property
    def pods(self) -> list[Object]:
        return [pod for pod in self.objects["Pod"] if pod["metadata"]["name"].startswith(RUN)]

    def snapshot(self) -> Snapshot:
        objects = {kind: copy.deepcopy(found) for kind, found in self.objects.items() if kind not in self.missing}
        return Snapshot(
            NOW, "kubernetes", "test", SPACE, RUN, objects, dict(self.missing), dict(self.limits), self.record
        )


def healthy() -> World:
    """Two pods train on two nodes: step 412 of 1,000."""
    world = World()
    world.add("Job", run_object())
    for number, name in enumerate(("node-a", "node-b")):
        world.add("Node", node(name))
        world.add("Pod", pod(number, name))
    world.add("Service", {"metadata": meta(RUN), "spec": {"clusterIP": "None", "selector": {"orchestrator/run": RUN}}})
    world.add("PersistentVolumeClaim", claim("runs"))
    world.add("Secret", {"metadata": meta("wandb")})
    world.add("ConfigMap", {"metadata": meta(f"run-{RUN}")})
    world.add("StorageClass", {"metadata": {"name": "shared"}, "volumeBindingMode": "Immediate"})
    world.add(
        "Namespace", {"metadata": {"name": SPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    )
    world.record = {"facts": {"state": "running", "attempt": 1, "step": 412, "total_steps": 1000, "world_size": 2}}
    return world


def meta(name: str, owner: Object | None = None, at: str = BEGAN, **more: Any) -> Object:
    owners = [{"kind": owner["kind"], "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"],
               "controller": True}] if owner else []  # fmt: skip
    return {"name": name, "namespace": SPACE, "uid": f"uid-{name}", "creationTimestamp": at,
            "ownerReferences": owners, **more}  # fmt: skip


def run_object(kind: str = "Job", **spec: Any) -> Object:
    return {
        "kind": kind,
        "metadata": {**meta(RUN), "labels": dict(LABELS), "annotations": {}},
        "spec": {"suspend": False, "completions": 2, "parallelism": 2, **spec},
        "status": {"active": 2, "ready": 2, "startTime": BEGAN},
    }


def node(name: str, gpus: int = 8, **spec: Any) -> Object:
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "kubelet is posting ready status",
             "lastTransitionTime": BEGAN}  # fmt: skip
    room = {"cpu": "32", "memory": "256Gi", "ephemeral-storage": "500Gi", "pods": "110"}
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "pool": "a100"}, "uid": f"uid-{name}"},
        "spec": spec,
        "status": {"allocatable": {**room, **({GPU: str(gpus)} if gpus else {})}, "conditions": [ready]},
    }


def pod(index: int, where: str | None, *, gpus: int = 8, suffix: str = "aaaaa", owner: Object | None = None) -> Object:
    """One that runs since a second after it was made."""
    labels = {**LABELS, "batch.kubernetes.io/job-completion-index": str(index)}
    name = f"{RUN}-{index}-{suffix}"
    amounts = {"cpu": "4", "memory": "8Gi", **({GPU: str(gpus)} if gpus else {})}
    spec = {
        "subdomain": RUN,
        "priority": 0,
        "containers": [{"name": "node", "image": IMAGE, "resources": {"limits": amounts, "requests": amounts}}],
        "volumes": [
            {"name": "claim-0", "persistentVolumeClaim": {"claimName": "runs"}},
            {"name": "secret-tracking", "secret": {"secretName": "wandb"}},
            {"name": "run", "configMap": {"name": f"run-{RUN}"}},
        ],
        **({"nodeName": where} if where else {}),
    }
    conditions = [condition("PodScheduled", "True"), condition("Ready", "True")]
    state = {"running": {"startedAt": "2026-01-01T10:00:05Z"}}
    status = {"phase": "Running", "conditions": conditions, "startTime": BEGAN,
              "containerStatuses": [{"name": "node", "image": IMAGE, "restartCount": 0, "state": state}]}  # fmt: skip
    return {"metadata": {**meta(name, owner or run_object()), "labels": labels}, "spec": spec, "status": status}


def condition(kind: str, status: str, reason: str = "", message: str = "", at: str = BEGAN) -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": at}


def claim(name: str, phase: str = "Bound", storage_class: str = "shared") -> Object:
    spec = {"storageClassName": storage_class, "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "10Gi"}}}  # fmt: skip
    return {"metadata": meta(name), "spec": spec, "status": {"phase": phase}}


def event(about: Object, reason: str, message: str, at: str = "2026-01-01T10:05:00Z", kind: str = "Warning") -> Object:
    named = {"kind": about["kind"], "name": about["metadata"]["name"], "uid": about["metadata"].get("uid"),
             "namespace": SPACE}  # fmt: skip
    return {"metadata": meta(f"{named['name']}.{reason}.{at}"), "type": kind, "reason": reason, "message": message,
            "involvedObject": named, "count": 3, "firstTimestamp": BEGAN, "lastTimestamp": at}  # fmt: skip


def pending(one: Object, message: str, reason: str = "Unschedulable") -> None:
    """The scheduler finds no node for it."""
    one["spec"].pop("nodeName", None)
    conditions = [condition("PodScheduled", "False", reason, message)]
    one["status"] = {"phase": "Pending", "conditions": conditions}


def waiting(one: Object, reason: str, message: str = "") -> None:
    """It has a node, and its container has not begun."""
    state = {"waiting": {"reason": reason, **({"message": message} if message else {})}}
    container = {"name": "node", "image": IMAGE, "restartCount": 0, "state": state}
    conditions = [condition("PodScheduled", "True")]
    one["status"] = {"phase": "Pending", "conditions": conditions, "containerStatuses": [container]}


def ended(one: Object, code: int, error: str | None = None, *, rank: int | None = 0, reason: str = "Error",
          at: str = "2026-01-01T10:08:00Z") -> None:  # fmt: skip
    """Its container ended, with the last words of a launcher."""
    words = {"schema": 1, "run_id": RUN, "attempt": 1, "node": 0, "rank": rank, "exit_code": code, "error": error}
    message = json.dumps(words) if reason == "Error" else ""
    done = {"exitCode": code, "reason": reason, "finishedAt": at, "startedAt": BEGAN, "message": message}
    one["status"]["phase"] = "Failed" if code else "Succeeded"
    one["status"]["containerStatuses"] = [{"name": "node", "restartCount": 0, "state": {"terminated": done}}]


def without_pods(world: World, *, unborn: bool = True) -> None:
    world.objects["Pod"] = [one for one in world.objects["Pod"] if not one["metadata"]["name"].startswith(RUN)]
    world.run["status"] = {} if unborn else {"active": 0}
    world.record = {"facts": {"state": "starting"}}


def failed(world: World, reason: str, message: str) -> None:
    world.run["status"] = {"failed": 2, "conditions": [condition("Failed", "True", reason, message)]}
    world.record = {"facts": {"state": "failed"}}


def queued(world: World, message: str, *conditions: Object, reason: str = "Pending") -> Object:
    """The run waits in queue `gpus` of ClusterQueue `team`, which has 16 GPUs of flavor `a100`."""
    without_pods(world)
    world.run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpus"
    world.run["spec"]["suspend"] = True
    flavor = {"name": "a100", "resources": [{"name": GPU, "nominalQuota": "16"}]}
    used = {"name": "a100", "resources": [{"name": GPU, "total": "12", "borrowed": "0"}]}
    world.add("LocalQueue", {"metadata": meta("gpus"), "spec": {"clusterQueue": "team"}})
    world.add("ClusterQueue", {
        "metadata": {"name": "team", "uid": "uid-team"},
        "spec": {"resourceGroups": [{"coveredResources": [GPU], "flavors": [flavor]}]},
        "status": {"flavorsReservation": [used], "conditions": [condition("Active", "True", "Ready")]},
    })  # fmt: skip
    held = [condition("QuotaReserved", "False", reason, message)] if message else []
    return world.add("Workload", workload(RUN, world.run, conditions=[*held, *conditions]))


def workload(name: str, owner: Object | None = None, *, priority: int = 0, at: str = BEGAN, holds: int = 0,
             conditions: list[Object] | None = None) -> Object:  # fmt: skip
    """Kueue's record; `holds`: GPUs, for one that was admitted."""
    admitted = [condition("QuotaReserved", "True", "QuotaReserved", "Quota reserved in ClusterQueue team"),
                condition("Admitted", "True", "Admitted", "The workload is admitted")]  # fmt: skip
    admission = {"clusterQueue": "team", "podSetAssignments": [{"name": "main", "count": 1, "flavors": {GPU: "a100"},
                                                                 "resourceUsage": {GPU: str(holds)}}]}  # fmt: skip
    owner = owner or {"kind": "Job", "metadata": {"name": name, "uid": f"uid-run-{name}"}}
    return {
        "metadata": meta(f"job-{name}-00000", owner, at),
        "spec": {"queueName": "gpus", "priority": priority, "active": True, "podSets": [{"name": "main", "count": 2}]},
        "status": {"conditions": conditions if conditions is not None else admitted if holds else [],
                   **({"admission": admission} if holds else {})},
    }  # fmt: skip
