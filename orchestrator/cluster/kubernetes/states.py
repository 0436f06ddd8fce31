"""One state from the objects of a run, whatever kind it is. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.cluster.kubernetes.pods import cause_of, end_of, index_of, is_active, is_running, obstacle_of
from orchestrator.cluster.kubernetes.resources import STOPPED
from orchestrator.cluster.lines import last_words
from orchestrator.errors import EXIT_DONE, EXIT_STOPPED

Object = dict[str, Any]
QUEUE = "kueue.x-k8s.io/queue-name"
EXIT_CODE = re.compile(r"exit code (\d+)")
"""In the message of a Job that its policy failed."""
STOPPED_JOB = "STOPPED"
"""Of Ray's Jobs API."""
LONGEST_REASON = 300
"""Of Ray's words, which end with pages of a log."""
LIVING = ("queued", "starting", "running")


@dataclass(frozen=True, slots=True)
class Observed:
    """What the cluster tells of one run; without pods (in a list of runs) the state is the object's alone."""

    run: Object
    pods: Sequence[Object] = ()
    events: Sequence[Object] = ()
    workload: Object | None = None
    """Kueue's, where there is one that may be read."""
    looked: bool = True
    """Whether pods were asked for."""
    words: Mapping[str, Any] = field(default_factory=dict)
    """The last ones of a driver on Ray, whose pod is gone with its cluster."""
    unread: tuple[str, ...] = ()
    """What there was no right to look at, in sentences."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands on its cluster."""

    state: str
    """queued, starting, running, stopped, done or failed."""
    exit_code: int | None = None
    reason: str | None = None
    attempt: int | None = None
    """The newest one that a pod told of."""
    restarts: int = 0
    nodes: tuple[str, ...] = field(default=())
    """On which the run's pods are, the first node first."""

    @property
    def living(self) -> bool:
        return self.state in LIVING


def state_of(seen: Observed) -> RunState:
    """The one reading of all those objects."""
    state, said = _verdict(seen.run)
    ends = [end for end in map(end_of, seen.pods) if end]
    attempt = max((end.attempt for end in ends if end.attempt), default=None)
    active = sorted((pod for pod in seen.pods if is_active(pod)), key=index_of)
    nodes = tuple(pod["spec"]["nodeName"] for pod in active if pod["spec"].get("nodeName"))
    facts = {"attempt": attempt, "restarts": restarts_of(seen.run), "nodes": nodes}
    if state == "done":
        return RunState("done", EXIT_DONE, **facts)
    if state == "failed" and seen.run["kind"] == "RayJob":
        return _failed_on_ray(seen, said, facts)
    if state == "failed":
        return _failed(seen, said, facts)
    if is_suspended(seen):
        return _suspended(seen, active, facts)
    state = _progress(seen, active)
    reason = obstacle_of(active, seen.events) or "; ".join(seen.unread) or None if state == "starting" else None
    return RunState(state, None, reason, **facts)


def restarts_of(run: Object) -> int:
    """Starts after the first one, as far as the kind counts them. A Job counts failed pods, those of its end too."""
    status = run.get("status") or {}
    nodes = run.get("spec", {}).get("completions") or 1
    failures = -(-int(status.get("failed") or 0) // nodes)
    last = _verdict(run)[0] == "failed" and status.get("jobStatus") != STOPPED_JOB
    return int(status.get("restarts") or 0) or max(failures - last, 0)


def is_suspended(seen: Observed) -> bool:
    inactive = seen.workload is not None and seen.workload.get("spec", {}).get("active") is False
    return bool(seen.run.get("spec", {}).get("suspend")) or inactive


def queue_of(run: Object) -> str | None:
    return (run["metadata"].get("labels") or {}).get(QUEUE)


def has_ended(run: Object) -> bool:
    """Whether its controller has given its verdict."""
    return _verdict(run)[0] is not None


def _verdict(run: Object) -> tuple[str | None, str | None]:
    """(done | failed, in whose words), or nothing where the run has not ended."""
    if run["kind"] == "RayJob":
        return _ray_verdict(run.get("status") or {})
    conditions = {c["type"]: c for c in (run.get("status") or {}).get("conditions") or [] if c["status"] == "True"}
    if {"Complete", "Completed"} & set(conditions):
        return "done", None
    failed = conditions.get("Failed")
    if failed is None:
        return None, None
    return "failed", ": ".join(filter(None, (failed.get("reason"), failed.get("message"))))


def _ray_verdict(status: Object) -> tuple[str | None, str | None]:
    deployment, job = status.get("jobDeploymentStatus"), status.get("jobStatus")
    if deployment == "Complete" and job == "SUCCEEDED":
        return "done", None
    if deployment == "Complete" and job == STOPPED_JOB:
        return "failed", None
    if deployment in ("Complete", "Failed", "ValidationFailed"):
        return "failed", ": ".join(filter(None, (status.get("reason"), status.get("message")))) or f"Ray says {job}"
    return None, None


def _failed(seen: Observed, said: str | None, facts: dict[str, Any]) -> RunState:
    """By the pod that explains it; where the pods are gone, by the code in the controller's message."""
    end = cause_of(end for end in map(end_of, seen.pods) if end)
    found = EXIT_CODE.search(said or "")
    code = end.exit_code if end else int(found[1]) if found else None
    reason = said
    if end and end.error:
        who = f"rank {end.rank}" if end.rank is not None else end.pod
        reason = f"{who} on {end.node}: {end.error}" if end.node else f"{who}: {end.error}"
    return RunState("stopped" if code == EXIT_STOPPED else "failed", code, reason, **facts)


def _failed_on_ray(seen: Observed, said: str | None, facts: dict[str, Any]) -> RunState:
    """By the driver's own words. It has Ray stop its job where no retry would help, so a stop alone says nothing."""
    status = seen.run.get("status") or {}
    words = last_words(status.get("message") or "") or seen.words
    stopped = status.get("jobStatus") == STOPPED_JOB
    found = EXIT_CODE.search(said or "")
    code = words.get("exit_code", int(found[1]) if found else None)
    reason = words.get("error") or (said or "")[:LONGEST_REASON] or None
    if words.get("error") and words.get("rank") is not None:
        reason = f"rank {words['rank']}: {reason}"
    told = {**facts, "attempt": words.get("attempt") or facts["attempt"]}
    return RunState("stopped" if code == EXIT_STOPPED or (stopped and code is None) else "failed", code, reason, **told)


def _suspended(seen: Observed, active: Sequence[Object], facts: dict[str, Any]) -> RunState:
    """Suspended by `cancel` or by a queue that has no room."""
    if active:
        return RunState("running", None, f"is stopping: {len(active)} pods are saving", **facts)
    if is_queued(seen):
        return RunState("queued", None, _waits_for(seen), **facts)
    return RunState("stopped", EXIT_STOPPED, "suspended", **facts)


def is_queued(seen: Observed) -> bool:
    """Whether the queue, and not `cancel`, holds a suspended run."""
    if queue_of(seen.run) is None or STOPPED in (seen.run["metadata"].get("annotations") or {}):
        return False
    return seen.workload is None or seen.workload.get("spec", {}).get("active", True)


def _waits_for(seen: Observed) -> str:
    """Why the queue took the run's place, if it did, and what the run waits for now."""
    conditions = {one["type"]: one for one in ((seen.workload or {}).get("status") or {}).get("conditions") or []}

    def told(kind: str, status: str) -> str:
        found = conditions.get(kind, {})
        return str(found.get("message") or "") if found.get("status") == status else ""

    waits = told("QuotaReserved", "False") or told("Admitted", "False")
    said = dict.fromkeys(filter(None, (told("Evicted", "True"), waits)))
    return "; ".join(said) or "; ".join((f"waits until queue {queue_of(seen.run)} admits it", *seen.unread))


def wanted_pods(run: Object) -> int:
    """How many pods a run has that is whole, as far as its own object says."""
    spec = run.get("spec") or {}
    if run["kind"] == "TrainJob":
        return int((spec.get("trainer") or {}).get("numNodes") or 1)
    if run["kind"] == "RayJob":
        groups = (spec.get("rayClusterSpec") or {}).get("workerGroupSpecs") or []
        return 1 + sum(int(group.get("replicas") or 0) for group in groups)
    jobs = [job["template"]["spec"] for job in spec.get("replicatedJobs") or []] or [spec]
    return sum(int(job.get("completions") or 1) for job in jobs)


def _progress(seen: Observed, active: Sequence[Object]) -> str:
    """`running` where every node's pod runs."""
    if seen.looked:
        there = len(active) + sum(pod.get("status", {}).get("phase") == "Succeeded" for pod in seen.pods)
        complete = there >= wanted_pods(seen.run)  # a quota may refuse some of them
        return "running" if active and complete and all(map(is_running, active)) else "starting"
    status = seen.run.get("status") or {}
    parts = [status, *(status.get("replicatedJobsStatus") or []), *(status.get("jobsStatus") or [])]
    ready = sum(int(part.get("ready") or 0) for part in parts)
    return "running" if ready or status.get("jobStatus") == "RUNNING" else "starting"
