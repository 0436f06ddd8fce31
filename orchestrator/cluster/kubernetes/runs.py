"""Runs among the objects of a namespace: finding one, all of them, and what belongs to one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.cluster.kubernetes.api import Api, Object
from orchestrator.cluster.kubernetes.failures import Busy, Forbidden, NotFound, NotServed
from orchestrator.cluster.kubernetes.pods import container_of, is_running, speaks
from orchestrator.cluster.kubernetes.resources import (
    CONFIG_MAP,
    EVENT,
    KINDS,
    POD,
    PRODUCT,
    RUN,
    WORKLOAD,
    Resource,
    is_controlled,
    is_run,
    resource_of,
    run_of,
)  # fmt: skip
from orchestrator.cluster.kubernetes.states import Observed, has_ended, queue_of
from orchestrator.cluster.lines import last_words
from orchestrator.errors import UserError, nearest

logger = logging.getLogger(__name__)
WORDS = 100
"""Lines at the end of a log among which a driver's last words are."""
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


def find_run(api: Api, run_id: str, needed: Collection[Resource] = ()) -> Found | None:
    """Whatever kind the run is. Raises UserError where somebody else's object has its name.

    Raises Forbidden where there is none among what may be read, and a kind in `needed` may not be.
    """
    answers, forbidden = _of_each_kind(lambda resource: api.find(resource, run_id))
    for resource, found in answers:
        if found is None:
            continue
        run = _with_kind(resource, found)
        if is_run(run):
            return Found(run)
        if RUN not in run["metadata"].get("labels", {}) and not is_controlled(run):  # as the submitter of a RayJob is
            what = f"{run['kind']} {run_id} in namespace {api.namespace}"
            raise UserError(f"{what} is not orchestrator's. Way out: name=ANOTHER, or another cluster.namespace")
    for resource in needed:
        if resource in forbidden:
            raise forbidden[resource]
    return None


def get_run(api: Api, run_id: str) -> Found:
    """The same. Raises UserError with the nearest id where the cluster has none."""
    found = find_run(api, run_id, KINDS.values())
    if found is None:
        ids = [run_of(run) for run in all_runs(api)]
        hint = nearest(run_id, ids) if ids else "there is none at all."
        where = f"namespace {api.namespace} of {api.context}"
        raise UserError(f"ID {run_id} is no run in {where}: {hint} Way out: orchestrator ls, or submit it again")
    return found


def all_runs(api: Api) -> list[Object]:
    """The one that was made last at the end; kinds that may not be listed are told of."""
    runs, hidden = visible_runs(api)
    if hidden:
        kinds = ", ".join(hidden)
        logger.warning("runs that are %s are not shown: no right to list %s in %s", kinds, kinds, api.namespace)
    return runs


def visible_runs(api: Api) -> tuple[list[Object], list[str]]:
    """Runs, and the kinds that may not be listed; one call for each kind that the cluster serves."""
    pages, forbidden = _of_each_kind(lambda resource: api.list(resource, f"{PRODUCT},{RUN}")[0])
    runs = [_with_kind(resource, run) for resource, page in pages for run in page]
    hidden = [resource.plural for resource in forbidden]
    return sorted(filter(is_run, runs), key=lambda run: run["metadata"]["creationTimestamp"]), hidden


def observe(api: Api, found: Found) -> Observed:
    """All that tells where a run stands; events only where they may tell why it does not start."""
    pods = pods_of(api, run_of(found.run))
    all_run = pods != [] and all(map(is_running, pods))
    names = {pod["metadata"]["name"] for pod in pods} | {found.name}
    unread: list[str] = []
    events = [] if all_run or has_ended(found.run) else _unless(unread, lambda: _events_of(api, names)) or []
    workload = _unless(unread, lambda: find_workload(api, found))
    words = _words_of(api, found, pods)
    return Observed(found.run, pods, events, workload, unread=tuple(unread), words=words)


def _words_of(api: Api, found: Found, pods: Sequence[Object]) -> dict[str, Any]:
    """The last ones of a driver on Ray, from the log of the pod that has followed it."""
    if found.run["kind"] != "RayJob" or not has_ended(found.run):
        return {}
    speaking = sorted(filter(speaks, pods), key=lambda pod: pod["metadata"]["creationTimestamp"])
    return last_words("\n".join(tail_of(api, speaking[-1], WORDS))) if speaking else {}


def tail_of(api: Api, pod: Object, lines: int) -> list[str]:
    """The last lines of the log of a pod that has started; none where it is gone since it was listed.

    None, and a warning, where its node does not answer.
    """
    path = POD.path(api.namespace, pod["metadata"]["name"], "log")
    query = {"container": container_of(pod), "tailLines": str(lines)}
    try:
        return [line.decode(errors="replace") for line in api.stream(path, query, 30.0, patient=False)]
    except NotFound:
        return []
    except Busy as error:
        logger.warning("the last words of %s are not known: %s", pod["metadata"]["name"], error)
        return []


def pods_of(api: Api, run_id: str) -> list[Object]:
    return api.list(POD, f"{RUN}={run_id}")[0]


def _unless(unread: list[str], ask: Callable[[], T]) -> T | None:
    """An answer, or None: with the missing right added to `unread`, or where the cluster knows no such kind."""
    try:
        return ask()
    except Forbidden as error:
        unread.append(f"not checked: {error.right}")
    except NotServed:
        pass
    return None


def find_workload(api: Api, found: Found) -> Object | None:
    """Kueue's record of the run, where there is one."""
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
    events = api.list(EVENT, fields="type=Warning")[0]
    return [event for event in events if event["involvedObject"].get("name") in names]


def _of_each_kind(ask: Callable[[Resource], T]) -> tuple[list[tuple[Resource, T]], dict[Resource, Forbidden]]:
    """The answers of the kinds that the cluster serves, asked at once, and the refusals of those without a right.

    Raises Forbidden where no kind may be read at all.
    """
    answers: list[tuple[Resource, T]] = []
    forbidden: dict[Resource, Forbidden] = {}
    with ThreadPoolExecutor(len(KINDS)) as pool:
        for resource, answer in [(resource, pool.submit(ask, resource)) for resource in KINDS.values()]:
            try:
                answers.append((resource, answer.result()))
            except NotServed:
                continue
            except Forbidden as error:
                forbidden[resource] = error
    if forbidden and not answers:
        raise next(iter(forbidden.values()))
    return answers, forbidden


def _with_kind(resource: Resource, run: Object) -> Object:
    """The items of a list say neither what they are nor where they belong."""
    return {**run, "apiVersion": resource.api, "kind": resource.kind}
