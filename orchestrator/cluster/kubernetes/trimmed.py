"""What a snapshot keeps of an object: enough for every question about a run, no value that could be a secret. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.cluster.kubernetes.resources import RUN
from orchestrator.redact import GONE, redact

Object = dict[str, Any]
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
PLAIN = frozenset({
    "name", "namespace", "uid", "kind", "apiVersion", "secretName", "claimName", "nodeName", "phase", "type", "status",
    "reason", "resourceVersion", "creationTimestamp", "firstTimestamp", "lastTimestamp", "lastTransitionTime",
    "lastHeartbeatTime", "startTime", "startedAt", "finishedAt", "key", "effect", "operator", "cpu", "memory",
    "storageClassName", "queueName", "clusterQueue", "serviceAccountName", "priorityClassName", "containerID",
    "imageID",
})  # fmt: skip
"""Keys whose values are names, times and amounts: nothing to take out, and a secret's name must stay."""
META = ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "labels", "ownerReferences")
SECRETIVE = ("ConfigMap", "Secret")
"""Kinds of which the names are kept and nothing else."""
EVENT = ("involvedObject", "reason", "message", "type", "count", "firstTimestamp", "lastTimestamp", "eventTime",
         "reportingComponent", "source", "related")  # fmt: skip


def trimmed(obj: Object, kind: str, ours: bool) -> Object:
    """`ours`: whether it belongs to the run that is asked about, of which all is kept that is no secret."""
    if kind in SECRETIVE:
        return {"kind": kind, "metadata": _meta(obj)}
    keep: Callable[[Object], Object] | None = OTHERS.get(kind) if kind in ALWAYS or not ours else None
    kept = keep(obj) if keep else _whole(obj)
    return clean({**kept, "kind": kind, **({"apiVersion": obj["apiVersion"]} if "apiVersion" in obj else {})})


def _meta(obj: Object) -> Object:
    return {key: obj["metadata"][key] for key in META if key in obj["metadata"]}


def _whole(obj: Object) -> Object:
    meta = {key: value for key, value in obj["metadata"].items() if key != "managedFields"}
    if meta.get("annotations"):
        meta["annotations"] = {key: value for key, value in meta["annotations"].items() if key != LAST_APPLIED}
    return {**obj, "metadata": meta}


def _pod(obj: Object) -> Object:
    """Where it lies and what it takes."""
    spec, meta = obj["spec"], _meta(obj)
    labels = meta.get("labels") or {}
    meta["labels"] = {RUN: labels[RUN]} if RUN in labels else {}
    kept = {key: spec[key] for key in ("nodeName", "priority", "priorityClassName", "overhead") if key in spec}
    for key in ("containers", "initContainers"):
        if spec.get(key):
            kept[key] = [{"name": one["name"], "resources": one.get("resources") or {}} for one in spec[key]]
    status = obj.get("status") or {}
    return {
        "metadata": meta,
        "spec": kept,
        "status": {"phase": status.get("phase"), "startTime": status.get("startTime")},
    }


def _node(obj: Object) -> Object:
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    return {
        "metadata": _meta(obj),
        "spec": {key: spec[key] for key in ("taints", "unschedulable") if key in spec},
        "status": {key: status[key] for key in ("allocatable", "capacity", "conditions", "images") if key in status},
    }


def _event(obj: Object) -> Object:
    meta = {key: obj["metadata"].get(key) for key in ("name", "namespace", "creationTimestamp")}
    return {"metadata": meta, **{key: obj[key] for key in EVENT if obj.get(key) is not None}}


def _workload(obj: Object) -> Object:
    """Who waits and who holds what."""
    spec = obj.get("spec") or {}
    kept = {key: spec[key] for key in ("queueName", "priority", "priorityClassName", "active") if key in spec}
    kept["podSets"] = [{"name": one.get("name"), "count": one.get("count")} for one in spec.get("podSets") or []]
    return {"metadata": _meta(obj), "spec": kept, "status": obj.get("status") or {}}


def _other_run(obj: Object) -> Object:
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    kept = {key: status[key] for key in ("conditions", "jobStatus", "jobDeploymentStatus") if key in status}
    return {"metadata": _meta(obj), "spec": {"suspend": spec.get("suspend")}, "status": kept}


OTHERS: Mapping[str, Callable[[Object], Object]] = {
    "Pod": _pod, "Node": _node, "Event": _event, "Workload": _workload,
    **dict.fromkeys(("Job", "JobSet", "TrainJob", "RayJob", "RayCluster"), _other_run),
}  # fmt: skip
ALWAYS = ("Node", "Event")


def clean(value: Any, key: str = "") -> Any:
    """The same nested value without the values of environments and without what looks like a secret."""
    if isinstance(value, dict):
        return {name: clean(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [clean(item, key) for item in value]
        return [_unvalued(item) for item in items] if key == "env" else items
    if not isinstance(value, str) or key in PLAIN or len(value) < 8 or value.isdigit():
        return value
    return redact(value)


def _unvalued(variable: Any) -> Any:
    """A variable of an environment by its name; a reference to a secret is a name as well."""
    if isinstance(variable, dict) and "value" in variable:
        return {**variable, "value": GONE}
    return variable
