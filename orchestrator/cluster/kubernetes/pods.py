"""What the pods of a run say: pure readings of their status."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import EXIT_NODE, EXIT_TERMINATED, EXIT_TRANSIENT

Object = dict[str, Any]
INDEX = "batch.kubernetes.io/job-completion-index"
RAY_TYPE = "ray.io/node-type"
"""Label that KubeRay puts on the pods of a cluster."""
KILLED = 137
STUCK = (
    "ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError",
    "CreateContainerError", "RunContainerError", "CrashLoopBackOff",
)  # fmt: skip
"""What a container waits for that does not come by itself."""


@dataclass(frozen=True, slots=True)
class End:
    """How the container of a pod ended."""

    pod: str
    node: str
    exit_code: int
    attempt: int | None
    rank: int | None
    error: str | None
    at: str


def index_of(pod: Object) -> int:
    """Which node of the run a pod is."""
    meta = pod["metadata"]
    told = meta.get("labels", {}).get(INDEX) or meta.get("annotations", {}).get(INDEX) or "0"
    return int(told) if told.isdigit() else 0


def is_active(pod: Object) -> bool:
    """Whether its processes may still run."""
    return pod.get("status", {}).get("phase") in (None, "Pending", "Running")


def is_running(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]


def has_started(pod: Object) -> bool:
    """Whether its container has a log."""
    return any({"running", "terminated"} & set(one.get("state", {})) for one in statuses(pod))


def ray_type(pod: Object) -> str | None:
    """`head` or `worker` of a Ray cluster; None for any other pod, that which follows the driver's log too."""
    return pod["metadata"].get("labels", {}).get(RAY_TYPE)


def speaks(pod: Object) -> bool:
    """Whether its log tells where the run stands: the first node's, or that of the driver on Ray."""
    return index_of(pod) == 0 and ray_type(pod) is None and has_started(pod)


def has_log(pod: Object) -> bool:
    """Whether its log may tell of the run. What Ray says in pods of its own is read only where they have failed."""
    begun = has_started(pod) or failed_setup(pod) is not None
    return begun and (ray_type(pod) is None or not is_active(pod))


def container_of(pod: Object) -> str:
    """The name of the container that trains."""
    return str(pod["spec"]["containers"][0]["name"])


def statuses(pod: Object, which: str = "containerStatuses") -> list[Object]:
    return pod.get("status", {}).get(which) or []


def failed_setup(pod: Object) -> str | None:
    """The name of the init container that failed, if one did."""
    for one in statuses(pod, "initContainerStatuses"):
        if (one.get("state", {}).get("terminated") or {}).get("exitCode"):
            return str(one["name"])
    return None


def end_of(pod: Object) -> End | None:
    """By the JSON of its termination message, or by what the node says of the container."""
    node = str(pod["spec"].get("nodeName", ""))
    name = pod["metadata"]["name"]
    for one in [*statuses(pod, "initContainerStatuses"), *statuses(pod)]:
        ended = one.get("state", {}).get("terminated")
        if ended and ended.get("exitCode"):
            return _end(name, node, ended)
    if pod.get("status", {}).get("phase") == "Failed":  # evicted, or gone with its node: no container tells
        status = pod["status"]
        error = ": ".join(filter(None, (status.get("reason"), status.get("message"))))
        return End(name, node, EXIT_TERMINATED, None, None, error or "its node ended it", "")
    done = [one["state"]["terminated"] for one in statuses(pod) if one.get("state", {}).get("terminated")]
    return _end(name, node, done[0]) if done else None


def _end(name: str, node: str, ended: Object) -> End:
    told = _message(ended.get("message") or "")
    code, error = told.get("exit_code", ended["exitCode"]), told.get("error")
    if ended.get("reason") == "OOMKilled":
        code, error = KILLED, "out of memory: the kernel killed it at its limit (OOMKilled)"
    elif not told and ended["exitCode"]:
        error = (ended.get("message") or "").strip()[-300:] or None
    at = str(ended.get("finishedAt") or "")
    return End(name, node, int(code), told.get("attempt"), told.get("rank"), error, at)


def _message(text: str) -> Object:
    try:
        told = json.loads(text)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def cause_of(ends: Iterable[End]) -> End | None:
    """The end that explains the newest attempt: not of those that only left because a peer had gone."""
    known = [end for end in ends if end.exit_code]
    if not known:
        return None
    newest = max((end.attempt or 0 for end in known), default=0)
    return min((end for end in known if (end.attempt or newest) == newest), key=lambda end: (_victim(end), end.at))


def unfit_nodes(pods: Iterable[Object]) -> list[str]:
    """Nodes of which a launcher said that they are unfit."""
    ends = [end for end in map(end_of, pods) if end]
    return sorted({end.node for end in ends if end.exit_code == EXIT_NODE and end.node})


def _victim(end: End) -> int:
    """0: it failed; 1: it was told to go, or killed; 2: a peer or the network failed it."""
    if end.exit_code == EXIT_TRANSIENT:
        return 2
    return int(end.exit_code in (EXIT_TERMINATED, KILLED) and "memory" not in (end.error or ""))


def obstacle_of(pods: Sequence[Object], events: Sequence[Object]) -> str | None:
    """Why pods that should run do not, in the words of whoever holds them up."""
    for pod in pods:
        for one in [*statuses(pod, "initContainerStatuses"), *statuses(pod)]:
            waiting = one.get("state", {}).get("waiting") or {}
            if waiting.get("reason") in STUCK:
                return _on(pod, f"{waiting['reason']}: {waiting.get('message', '')}")
        for condition in pod.get("status", {}).get("conditions") or []:
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return _on(pod, f"{condition.get('reason', 'Pending')}: {condition.get('message', '')}")
    warnings = [event for event in events if event.get("type") == "Warning"]
    if not warnings:
        return None
    newest = max(warnings, key=event_time)
    return f"{newest['involvedObject'].get('name', '')}: {newest.get('reason')}: {newest.get('message')}".strip()


def event_time(event: Object) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")


def _on(pod: Object, text: str) -> str:
    return f"node {index_of(pod)} ({pod['metadata']['name']}): {text.strip().rstrip(':')}"
