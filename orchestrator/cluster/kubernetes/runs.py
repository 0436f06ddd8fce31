"""Runs among the objects of a namespace: finding one, all of them, and what belongs to one."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.cluster.kubernetes.api import Api, Object
from orchestrator.cluster.kubernetes.failures import Forbidden, NotServed
from orchestrator.cluster.kubernetes.pods import is_running
from orchestrator.cluster.kubernetes.resources import (
    CONFIG_MAP,
    EVENT,
    KINDS,
    POD,
    PRODUCT,
    RUN,
    WORKLOAD,
    Resource,
    is_run,
    resource_of,
    run_of,
)  # fmt: skip
from orchestrator.cluster.kubernetes.states import Observed, has_ended, queue_of
from orchestrator.errors import UserError, nearest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """A run's own object."""

    run: Object

    @property
    def resource(self) -> Resource:
        return resource_of(self.run)

    @property
    def name(self) -> str:
        return str(self.run["metadata"]["name"])

    @property
    def uid(self) -> str:
        return str(self.run["metadata"]["uid"])


def find_run(api: Api, run_id: str) -> Found | None:
    """Whatever kind the run is. Raises UserError where somebody else's object has its name."""
    for resource, found in _of_each_kind(lambda resource: api.find(resource, run_id)):
        if found is None:
            continue
        run = _with_kind(resource, found)
        if is_run(run):
            return Found(run)
        if RUN not in run["metadata"].get("labels", {}):
            what = f"{run['kind']} {run_id} in namespace {api.namespace}"
            raise UserError(f"{what} is not orchestrator's. Way out: name=ANOTHER, or another cluster.namespace")
    return None


def get_run(api: Api, run_id: str) -> Found:
    """The same. Raises UserError with the nearest id where the cluster has none."""
    found = find_run(api, run_id)
    if found is None:
        ids = [run_of(run) for run in all_runs(api)]
        hint = nearest(run_id, ids) if ids else "there is none at all."
        where = f"namespace {api.namespace} of {api.context}"
        raise UserError(f"ID {run_id} is no run in {where}: {hint} Way out: orchestrator ls, or submit it again")
    return found


def all_runs(api: Api) -> list[Object]:
    """The one that was made last at the end; one call for each kind that the cluster serves."""
    pages = _of_each_kind(lambda resource: api.list(resource, f"{PRODUCT},{RUN}")[0])
    runs = [_with_kind(resource, run) for resource, page in pages for run in page]
    return sorted(filter(is_run, runs), key=lambda run: run["metadata"]["creationTimestamp"])


def observe(api: Api, found: Found) -> Observed:
    """All that tells where a run stands; events only where they may tell why it does not start."""
    pods = pods_of(api, run_of(found.run))
    all_run = pods != [] and all(map(is_running, pods))
    names = {pod["metadata"]["name"] for pod in pods} | {found.name}
    events = [] if all_run or has_ended(found.run) else _events_of(api, names)
    return Observed(found.run, pods, events, workload_of(api, found))


def pods_of(api: Api, run_id: str) -> list[Object]:
    return api.list(POD, f"{RUN}={run_id}")[0]


def workload_of(api: Api, found: Found) -> Object | None:
    """Kueue's record of the run, where there is one that may be read."""
    try:
        return find_workload(api, found)
    except (Forbidden, NotServed):
        return None


def find_workload(api: Api, found: Found) -> Object | None:
    if queue_of(found.run) is None:
        return None
    for workload in api.list(WORKLOAD)[0]:
        if found.uid in (owner["uid"] for owner in workload["metadata"].get("ownerReferences", ())):
            return workload
    return None


def bundle_of(api: Api, run_id: str) -> dict[str, Any] | None:
    """run.json as it was sent, or None where it is gone."""
    found = api.find(CONFIG_MAP, f"run-{run_id}")
    return json.loads(found["data"]["run.json"]) if found else None


def _events_of(api: Api, names: set[str]) -> list[Object]:
    """Of the run, of its pods and of what its controllers made for it."""
    try:
        events = api.list(EVENT, fields="type=Warning")[0]
    except Forbidden:
        return []
    return [event for event in events if event["involvedObject"].get("name") in names]


def _of_each_kind(ask: Callable[[Resource], T]) -> list[tuple[Resource, T]]:
    """The answers of the kinds that the cluster serves and the rights allow, asked at once.

    Raises Forbidden where no kind may be read at all.
    """
    answers: list[tuple[Resource, T]] = []
    forbidden: list[Forbidden] = []
    with ThreadPoolExecutor(len(KINDS)) as pool:
        for resource, answer in [(resource, pool.submit(ask, resource)) for resource in KINDS.values()]:
            try:
                answers.append((resource, answer.result()))
            except NotServed:
                continue
            except Forbidden as error:
                forbidden.append(error)
    if forbidden and not answers:
        raise forbidden[0]
    return answers


def _with_kind(resource: Resource, run: Object) -> Object:
    """The items of a list say neither what they are nor where they belong."""
    return {**run, "apiVersion": resource.api, "kind": resource.kind}
