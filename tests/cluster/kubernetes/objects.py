"""Objects as the controllers of Kubernetes, JobSet, Trainer, KubeRay and Kueue leave them; by hand, for tests."""

from __future__ import annotations

import json
from typing import Any

RUN_ID = "digits-0123abcd"
LABELS = {"app.kubernetes.io/name": "orchestrator", "orchestrator/run": RUN_ID}
APIS = {
    "Job": "batch/v1",
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
    "RayJob": "ray.io/v1",
}
Object = dict[str, Any]


def template(name: str = RUN_ID) -> Object:
    spec = {
        "restartPolicy": "Never",
        "containers": [
            {
                "name": "node",
                "image": "registry.example/train@sha256:00",
                "command": ["python", "-m", "jobs.node"],
                "volumeMounts": [{"name": "runs", "mountPath": "/runs"}],
            }
        ],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}},
            {"name": "run", "configMap": {"name": f"run-{name}"}},
            {"name": "code", "configMap": {"name": "code-0123456789ab"}},
        ],
    }
    return {"metadata": {"labels": {**LABELS, "orchestrator/run": name}}, "spec": spec}


def run_object(
    kind: str = "Job",
    *,
    name: str = RUN_ID,
    suspend: bool = False,
    queue: str | None = None,
    status: Object | None = None,
    **annotations: str,
) -> Object:
    labels = {**LABELS, "orchestrator/run": name, **({"kueue.x-k8s.io/queue-name": queue} if queue else {})}
    spec: Object = {"suspend": suspend, "completions": 2, "parallelism": 2, "template": template(name)}
    if kind == "JobSet":
        spec = {
            "suspend": suspend,
            "replicatedJobs": [{"name": "node", "template": {"spec": {"template": template(name)}}}],
        }
    notes = {key.replace("__", "/"): value for key, value in annotations.items()}
    meta = {"name": name, "uid": f"uid-{name}", "labels": labels, "annotations": notes}
    return {"apiVersion": APIS[kind], "kind": kind, "metadata": meta, "spec": spec, "status": status or {}}


def condition(kind: str, reason: str = "", message: str = "", status: str = "True") -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def pod(
    index: int = 0,
    phase: str = "Running",
    *,
    suffix: str = "aaaaa",
    name: str = RUN_ID,
    node: str | None = "rig-a",
    state: Object | None = None,
    **status: Any,
) -> Object:
    state = state if state is not None else {"running": {}} if phase == "Running" else {}
    labels = {**LABELS, "orchestrator/run": name, "batch.kubernetes.io/job-completion-index": str(index)}
    spec = {"containers": [{"name": "node"}], **({"nodeName": node} if node else {})}
    told = {"phase": phase, "containerStatuses": [{"name": "node", "state": state}] if state else [], **status}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{name}-{index}-{suffix}", "labels": labels},
        "spec": spec,
        "status": told,
    }


def ended(code: int, error: str | None = None, *, attempt: int = 1, rank: int | None = 0, at: str = "10:00") -> Object:
    message = {
        "schema": 1,
        "run_id": RUN_ID,
        "attempt": attempt,
        "node": 0,
        "rank": rank,
        "exit_code": code,
        "error": error,
    }
    return {
        "terminated": {
            "exitCode": code,
            "reason": "Error",
            "finishedAt": f"2026-01-01T{at}:00Z",
            "message": json.dumps(message),
        }
    }


def event(reason: str, message: str, at: str = "10:00", kind: str = "Job", name: str = RUN_ID) -> Object:
    return {
        "metadata": {"name": f"{name}.{at}"},
        "type": "Warning",
        "reason": reason,
        "message": message,
        "lastTimestamp": f"2026-01-01T{at}:00Z",
        "involvedObject": {"kind": kind, "name": name},
    }


def workload(active: bool = True, *conditions: Object) -> Object:
    owner = {"uid": f"uid-{RUN_ID}", "kind": "Job", "name": RUN_ID, "controller": True}
    return {
        "apiVersion": "kueue.x-k8s.io/v1beta1",
        "kind": "Workload",
        "metadata": {"name": f"job-{RUN_ID}-1", "ownerReferences": [owner]},
        "spec": {"active": active},
        "status": {"conditions": list(conditions)},
    }
