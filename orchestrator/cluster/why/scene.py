"""One run among the objects of a snapshot: its own objects, its pods, what was said of each, and when. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from orchestrator.cluster.kubernetes.pods import event_time, index_of, is_active, is_running, statuses
from orchestrator.cluster.kubernetes.resources import RUN
from orchestrator.cluster.kubernetes.states import Observed, RunState, state_of
from orchestrator.cluster.snapshot import Snapshot
from orchestrator.cluster.why.cause import Evidence, shown
from orchestrator.errors import UserError, nearest

Object = dict[str, Any]
RUNS = ("TrainJob", "RayJob", "JobSet", "Job")
OWNED = ("JobSet", "Job", "RayCluster", "Workload", "Pod", "Service")
"""Kinds that controllers make for a run, the outer ones first."""


@dataclass(frozen=True)
class Scene:
    """What concerns one run."""

    snapshot: Snapshot
    run: Object
    pods: Sequence[Object]
    """Its own, the first node first, the newest of each node last."""
    children: Sequence[Object]
    """Of its controllers, without pods and queue."""
    workload: Object | None

    @property
    def name(self) -> str:
        return str(self.run["metadata"]["name"])

    @property
    def record(self) -> Mapping[str, Any]:
        return self.snapshot.record

    @property
    def now(self) -> float:
        return seconds(self.snapshot.taken)

    @cached_property
    def state(self) -> RunState:
        return state_of(Observed(self.run, self.pods, self.warnings, self.workload))

    @cached_property
    def active(self) -> list[Object]:
        return [pod for pod in self.pods if is_active(pod)]

    @cached_property
    def settled(self) -> bool:
        """Whether the run goes on, so that what earlier pods met is over."""
        if self.state.state == "done":
            return True
        running = [pod for pod in self.active if is_running(pod)]
        whole = len(running) + len(self.finished) >= self.wanted
        return self.state.state == "running" and whole and len(running) == len(self.active)

    @cached_property
    def finished(self) -> list[Object]:
        """Pods that ended well, at the end of a run one before the other."""
        return [pod for pod in self.pods if (pod.get("status") or {}).get("phase") == "Succeeded"]

    @cached_property
    def wanted(self) -> int:
        """How many pods it should have, as far as its Jobs say; at least one."""
        jobs = [one for one in (self.run, *self.children) if one["kind"] == "Job"]
        return max(1, sum(int((job.get("spec") or {}).get("parallelism") or 1) for job in jobs))

    @cached_property
    def events(self) -> list[Object]:
        """Of the run, of what was made for it and of pods that are gone, the oldest first."""
        uids = {obj["metadata"].get("uid") for obj in (self.run, *self.children, *self.pods)}
        names = {obj["metadata"]["name"] for obj in (self.run, *self.children, *self.pods)}
        if self.workload is not None:
            uids.add(self.workload["metadata"].get("uid"))
        names |= set(claims_of(self.pods))
        found = [one for one in self.snapshot.of("Event") if self._concerns(one, uids, names)]
        return sorted(found, key=event_time)

    def _concerns(self, event: Object, uids: set[Any], names: set[str]) -> bool:
        about = event.get("involvedObject") or event.get("regarding") or {}
        name = str(about.get("name", ""))
        return (about.get("uid") or "") in uids or name in names or name.startswith(f"{self.name}-")

    @cached_property
    def warnings(self) -> list[Object]:
        return [event for event in self.events if event.get("type") == "Warning"]

    @cached_property
    def by_name(self) -> Mapping[str, list[Object]]:
        """Events by the name of their object."""
        found: dict[str, list[Object]] = defaultdict(list)
        for event in self.events:
            found[str((event.get("involvedObject") or {}).get("name", ""))].append(event)
        return found

    def events_of(self, obj: Object, *reasons: str) -> list[Object]:
        """Of one object, with one of these reasons, the oldest first."""
        found = self.by_name.get(obj["metadata"]["name"], [])
        uid = obj["metadata"].get("uid")
        mine = [event for event in found if (event["involvedObject"].get("uid") or uid) == uid]
        return [event for event in mine if event.get("reason") in reasons]

    def named(self, kind: str, name: str | None) -> Object | None:
        return next((one for one in self.snapshot.of(kind) if one["metadata"]["name"] == name), None)


def find_scene(snapshot: Snapshot, run_id: str | None) -> Scene:
    """Of the run that is asked for, or of the only one that there is. Raises UserError for an unknown one."""
    run = _find_run(snapshot, run_id or snapshot.run_id)
    wanted, inside = run["metadata"].get("labels", {}).get(RUN), owned_by(snapshot, run)
    pods = [pod for pod in inside if pod["kind"] == "Pod"]
    if wanted:
        known = {id(pod) for pod in pods}
        labelled = (pod for pod in snapshot.of("Pod") if (pod["metadata"].get("labels") or {}).get(RUN) == wanted)
        pods += [{**pod, "kind": "Pod"} for pod in labelled if id(pod) not in known and not _has(pods, pod)]
    pods.sort(key=lambda pod: (index_of(pod), pod["metadata"].get("creationTimestamp") or ""))
    children = [one for one in inside if one["kind"] in ("JobSet", "Job", "RayCluster")]
    workload = next((one for one in inside if one["kind"] == "Workload"), None)
    return Scene(snapshot, run, pods, children, workload)


def _has(pods: Iterable[Object], pod: Object) -> bool:
    uid = pod["metadata"].get("uid")
    return uid is not None and any(one["metadata"].get("uid") == uid for one in pods)


def _find_run(snapshot: Snapshot, run_id: str | None) -> Object:
    runs = list(_runs(snapshot))
    if run_id is None and len(runs) == 1:
        return runs[0]
    names = {str(run["metadata"]["name"]): run for run in runs}
    labels = {str((run["metadata"].get("labels") or {}).get(RUN, "")): run for run in runs}
    found = names.get(run_id or "") or labels.get(run_id or "")
    if found is not None:
        return found
    if run_id is None:
        some = ", ".join(sorted(names)[:5]) or "none"
        raise UserError(f"the snapshot has {len(runs)} runs ({some}). Way out: orchestrator why ID --snapshot FILE")
    hint = nearest(run_id, names) if names else "there is none at all"
    raise UserError(f"ID {run_id} is no run in the snapshot: {hint}. Way out: one that is, or take it again")


def _runs(snapshot: Snapshot) -> Iterator[Object]:
    """Objects of a run's kind that no other controller made."""
    for kind in RUNS:
        for obj in snapshot.of(kind):
            if not any(owner.get("controller") for owner in obj["metadata"].get("ownerReferences") or ()):
                yield {**obj, "kind": kind}


def owned_by(snapshot: Snapshot, run: Object) -> list[Object]:
    """All that hangs below a run, level by level."""
    uids, found = {run["metadata"].get("uid")}, []
    for kind in OWNED:
        for obj in snapshot.of(kind):
            owners = {owner.get("uid") for owner in obj["metadata"].get("ownerReferences") or ()}
            if owners & uids:
                uids.add(obj["metadata"].get("uid"))
                found.append({**obj, "kind": kind})
    return found


@lru_cache(maxsize=1 << 14)
def seconds(moment: str) -> float:
    """Since 1970; 0 for what is no moment."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return 0.0


def when(event: Object) -> float:
    return seconds(event_time(event))


def condition(obj: Object, kind: str) -> Object | None:
    """One of an object's conditions, whatever its status."""
    return next((one for one in (obj.get("status") or {}).get("conditions") or [] if one["type"] == kind), None)


def is_true(obj: Object, kind: str) -> bool:
    return (condition(obj, kind) or {}).get("status") == "True"


def begun(pod: Object) -> float:
    """When its containers last began; 0 where none has."""
    moments = [
        str(state.get("startedAt") or "")
        for one in (*statuses(pod, "initContainerStatuses"), *statuses(pod))
        for state in (one.get("state") or {}).values()
        if state
    ]
    return max(map(seconds, moments), default=0.0)


def claims_of(pods: Iterable[Object]) -> list[str]:
    names = [
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods
        for volume in pod["spec"].get("volumes") or []
        if volume.get("persistentVolumeClaim")
    ]
    return list(dict.fromkeys(names))


def of_object(obj: Object, where: str, value: object) -> Evidence:
    return Evidence(f"{obj.get('kind', 'Pod')} {obj['metadata']['name']}", where, shown(value))


def of_condition(obj: Object, found: Object) -> Evidence:
    said = ": ".join(filter(None, (found.get("reason"), found.get("message")))) or found["status"]
    return of_object(obj, f"status.conditions[{found['type']}]", said)


def of_event(event: Object) -> Evidence:
    about = event.get("involvedObject") or {}
    times = f" ({event['count']} times)" if (event.get("count") or 1) > 1 else ""
    text = shown(f"{event.get('message', '')}{times}")
    return Evidence(f"Event on {about.get('kind', '')} {about.get('name', '')}", str(event.get("reason")), text)
