"""Stop a run, go on with it, end its objects: what all kinds have in common is `spec.suspend`."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from orchestrator.cluster.kubernetes.api import Api, Object
from orchestrator.cluster.kubernetes.failures import Conflict
from orchestrator.cluster.kubernetes.pods import is_active
from orchestrator.cluster.kubernetes.resources import (
    CONFIG_MAP,
    NETWORK_POLICY,
    POD,
    SERVICE,
    STOPPED,
    SUBMISSION,
    TRAINING_RUNTIME,
    WORKLOAD,
    run_of,
)  # fmt: skip
from orchestrator.cluster.kubernetes.runs import Found, find_workload, pods_of, visible_runs
from orchestrator.cluster.kubernetes.states import queue_of
from orchestrator.errors import OrchestratorError, TransientError

logger = logging.getLogger(__name__)

ARCHIVE = "orchestrator/archive"
"""Annotation: sha256 of the code's archive."""
POLL_S = 0.5
MARGIN_S = 60.0
"""Beyond their grace period, that pods may take to go."""
UNMARK: Object = {"metadata": {"annotations": {STOPPED: None}}}
NOTED_S = 10.0
"""In which a controller says that it has suspended a run; pods may come until then."""
QUEUE_S = 10.0
"""In which Kueue takes note of a run."""
SERVER_OWNED = ("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields", "ownerReferences",
                "finalizers", "selfLink", "namespace", "deletionTimestamp")  # fmt: skip
OF_A_JOB = ("controller-uid", "batch.kubernetes.io/controller-uid", "job-name", "batch.kubernetes.io/job-name")
"""Labels that the server puts on the pods of a Job."""


def suspend(api: Api, found: Found, now: bool) -> None:
    """Let the ranks save and go, or kill them; returns when no pod is left and none will come."""
    mark = {"metadata": {"annotations": {STOPPED: datetime.now(UTC).isoformat(timespec="seconds")}}}
    workload = _workload_to_stop(api, found)
    if workload is not None:  # the queue would start what is only suspended
        api.patch(found.resource, found.name, mark)
        try:
            api.patch(WORKLOAD, workload["metadata"]["name"], {"spec": {"active": False}})
        except OrchestratorError:
            api.patch(found.resource, found.name, UNMARK)
            raise
    else:
        api.patch(found.resource, found.name, {**mark, "spec": {"suspend": True}})
    if now:
        _kill(api, found)
    until = time.monotonic() + NOTED_S
    while not _is_noted(api, found) and time.monotonic() < until:
        time.sleep(POLL_S)
    if now:  # those that were being made meanwhile
        _kill(api, found)
    wait_for_pods(api, found, _active(api, found))


def _kill(api: Api, found: Found) -> None:
    for pod in _active(api, found):
        api.delete(POD, pod["metadata"]["name"], grace_s=0)


def _is_noted(api: Api, found: Found) -> bool:
    """Whether the run's controller knows that it is suspended, or has ended: then no pod comes any more."""
    status = (api.find(found.resource, found.name) or {}).get("status") or {}
    told = {one["type"] for one in status.get("conditions") or [] if one["status"] == "True"}
    return bool({*told, status.get("jobDeploymentStatus")} & {"Suspended", "Complete", "Completed", "Failed"})


def _workload_to_stop(api: Api, found: Found) -> Object | None:
    """The queue's record, which comes a moment after the run. Raises Forbidden: without it nothing would stop."""
    until = time.monotonic() + QUEUE_S
    while queue_of(found.run) is not None and time.monotonic() < until:
        workload = find_workload(api, found)
        if workload is not None:
            return workload
        time.sleep(POLL_S)
    return None


def start_again(api: Api, found: Found) -> None:
    """Take back what `suspend` did; a queue admits the run again when it has room."""
    workload = find_workload(api, found)
    if queue_of(found.run) is None:
        api.patch(found.resource, found.name, {**UNMARK, "spec": {"suspend": False}})
        return
    api.patch(found.resource, found.name, UNMARK)
    if workload is not None:
        api.patch(WORKLOAD, workload["metadata"]["name"], {"spec": {"active": True}})


def erase(api: Api, found: Found) -> None:
    """Remove a run with all that it owns; returns when its name is free and none of its pods is left.

    Where another one has taken the name meanwhile, that one stays.
    """
    pods = _active(api, found)
    try:
        api.delete(found.resource, found.name, uid=found.uid)
    except Conflict:
        return
    if found.run["kind"] == "TrainJob":  # must be there before its run, so that it cannot be owned by it
        api.delete(TRAINING_RUNTIME, found.name)
    _until(lambda: not _is_there(api, found), MARGIN_S, f"{found.run['kind']} {found.name}")
    wait_for_pods(api, found, pods)


def _is_there(api: Api, found: Found) -> bool:
    now = api.find(found.resource, found.name)
    return now is not None and now["metadata"]["uid"] == found.uid


def collect_code(api: Api, found: Found) -> None:
    """Remove the archive of a run that is gone, unless another run has the same code or may have it, unseen."""
    digest = archive_of(found.run)
    runs, hidden = visible_runs(api)
    if digest and not hidden and digest not in map(archive_of, runs):
        api.delete(CONFIG_MAP, f"code-{digest[:12]}")


def archive_of(run: Object) -> str | None:
    return (run["metadata"].get("annotations") or {}).get(ARCHIVE)


def wait_for_pods(api: Api, found: Found, pods: Sequence[Object]) -> None:
    """Until none of these pods runs. Raises TransientError long after they should have gone."""
    if not pods:
        return
    uids = {pod["metadata"]["uid"] for pod in pods}
    grace_s = max(pod["spec"].get("terminationGracePeriodSeconds") or 30 for pod in pods)
    logger.info("%s: %d pods are saving, for at most %d s", found.name, len(pods), grace_s)
    limit_s, what = grace_s + MARGIN_S, f"pods of {found.name}"
    _until(lambda: not uids & {pod["metadata"]["uid"] for pod in _active(api, found)}, limit_s, what)
    logger.info("%s: its pods are gone", found.name)


def _active(api: Api, found: Found) -> list[Object]:
    return [pod for pod in pods_of(api, run_of(found.run)) if is_active(pod)]


def _until(done: Callable[[], bool], limit_s: float, what: str) -> None:
    until = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > until:
            way_out = "look at its node, which may be lost (kubectl get nodes), then try again"
            raise TransientError(f"{what}: still there after {limit_s:.0f} s. Way out: {way_out}")
        time.sleep(POLL_S)


def objects_of(api: Api, found: Found) -> list[Object]:
    """The objects of a run as they could be sent again, the run last."""
    names = ((CONFIG_MAP, f"run-{found.name}"), (TRAINING_RUNTIME, found.name), (NETWORK_POLICY, found.name),
             (SERVICE, found.name))  # fmt: skip
    wanted = [pair for pair in names if pair[0] is not TRAINING_RUNTIME or found.run["kind"] == "TrainJob"]
    parts = [(resource, api.find(resource, name)) for resource, name in wanted]
    typed = [{**part, "apiVersion": resource.api, "kind": resource.kind} for resource, part in parts if part]
    return [bare(obj) for obj in (*typed, found.run)]


def bare(obj: Object) -> Object:
    """An object as it was sent, without what the server and its controllers added. Pure."""
    plain = {key: copy.deepcopy(value) for key, value in obj.items() if key != "status"}
    plain["metadata"] = {key: value for key, value in plain["metadata"].items() if key not in SERVER_OWNED}
    notes = plain["metadata"].get("annotations") or {}
    plain["metadata"]["annotations"] = {k: v for k, v in notes.items() if k not in (STOPPED, SUBMISSION)}
    spec: dict[str, Any] = plain.get("spec") or {}
    if obj["kind"] == "Service":
        spec.pop("clusterIPs", None)
    if obj["kind"] == "Job":
        spec.pop("selector", None)
        labels = spec["template"]["metadata"].get("labels") or {}
        spec["template"]["metadata"]["labels"] = {k: v for k, v in labels.items() if k not in OF_A_JOB}
    return plain
