"""Send a run, all or nothing; sending it again finds it, continues it or starts it anew."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from orchestrator.cluster.job import JobSpec
from orchestrator.cluster.kubernetes.api import Api, Object, Request
from orchestrator.cluster.kubernetes.avoiding import is_warned, nodes_to_avoid
from orchestrator.cluster.kubernetes.failures import Conflict, Refused
from orchestrator.cluster.kubernetes.lifecycle import erase, objects_of, start_again
from orchestrator.cluster.kubernetes.references import check_references
from orchestrator.cluster.kubernetes.render import remarks, render
from orchestrator.cluster.kubernetes.resources import (
    ACCESS_REVIEW,
    JOBSET,
    KINDS,
    RUN,
    STOPPED,
    SUBMISSION,
    TRAINING_RUNTIME,
    Resource,
    resource_of,
)  # fmt: skip
from orchestrator.cluster.kubernetes.runs import Found, find_run, get_run, observe, pods_of
from orchestrator.cluster.kubernetes.states import RunState, is_suspended, state_of
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.options import JobKind

BUNDLE = ("config", "code")
"""Annotations by which two bundles are one; what else stands in them says where they were frozen."""
SENDING_S = 60.0
"""After which a run that was never let go is that of a submitter that was killed."""
TRIES = 20
PAUSE_S = 0.25
"""Between two looks at an object that is being removed, or that is not seen everywhere yet."""
UNSEEN_RUNTIME = "specified trainingRuntime must be created before"
Made = tuple[Resource, str, str]
"""Kind, name and uid of what this call created."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What came of sending a run."""

    run_id: str
    kind: str
    why: str
    """This kind was taken."""
    outcome: str
    """submitted, there (nothing was sent), resumed, or restarted (under the same name)."""
    state: RunState
    notes: tuple[str, ...]
    """What could not be checked, and what the kind cannot do."""


def submit(api: Api, spec: JobSpec, archive: bytes | None = None) -> Submission:
    """Raises ConfigError and Refused with nothing left behind."""
    kind, why = choose_kind(api, spec.kind)
    objects = render(spec, kind, archive)
    notes = [*check_references(api, spec), *remarks(spec, kind)]
    earlier = find_run(api, spec.run_id, [KINDS[kind]])
    outcome = "submitted"
    if earlier is not None:
        outcome = _meet(api, objects, earlier)
        why = "it is there already" if outcome != "restarted" else why
    if outcome == "restarted":
        assert earlier is not None
        unfit = nodes_to_avoid(objects_of(api, earlier), pods_of(api, spec.run_id))
        if unfit:
            objects = render(replace(spec, avoid_nodes=tuple(unfit)), kind, archive)
            notes.append(f"avoids {', '.join(unfit)}, which a launcher found unfit")
    before = earlier if outcome == "restarted" else None
    if outcome in ("submitted", "restarted") and not create(api, objects, before):
        _meet(api, objects, get_run(api, spec.run_id))
        outcome = "there"
        notes.append("another submitter was first")
    run = get_run(api, spec.run_id)
    return Submission(spec.run_id, run.run["kind"], why, outcome, state_of(observe(api, run)), tuple(notes))


def choose_kind(api: Api, wanted: JobKind) -> tuple[JobKind, str]:
    """The kind and why it was taken. Raises ConfigError where the cluster does not serve it."""
    if wanted is not JobKind.auto:
        if not api.serves(KINDS[wanted]):
            served = [kind.name for kind, resource in KINDS.items() if api.serves(resource)]
            rule = f"{api.server} does not serve {KINDS[wanted].plural} of {KINDS[wanted].api}"
            raise ConfigError("cluster.kind", wanted.name, rule, f"one of: auto, {', '.join(served)}")
        return wanted, "cluster.kind names it"
    if not api.serves(JOBSET):
        return JobKind.job, "the cluster serves no jobsets"
    if not _may_create(api, JOBSET):
        return JobKind.job, "there is no right to create jobsets"
    return JobKind.jobset, "it starts all nodes again together, and the cluster serves it"


def _may_create(api: Api, resource: Resource) -> bool:
    asked = {"verb": "create", "group": resource.group, "resource": resource.plural, "namespace": api.namespace}
    body = {"apiVersion": ACCESS_REVIEW.api, "kind": ACCESS_REVIEW.kind, "spec": {"resourceAttributes": asked}}
    review = api.call(Request("POST", ACCESS_REVIEW.path(api.namespace), body=body))
    return bool(review["status"]["allowed"])


def _meet(api: Api, objects: Sequence[Object], earlier: Found) -> str:
    """What sending means where the run is there: there, resumed, or restarted (which is left to the caller).

    Raises ConfigError where a living run was sent with another bundle.
    """
    seen = observe(api, earlier)
    state = state_of(seen)
    if state.living or _is_being_sent(earlier.run, datetime.now(UTC)):
        _require_same(objects[-1], earlier)
    if state.living or state.state == "done":
        return "there"
    if is_suspended(seen) and is_warned(earlier.run, seen.pods) and not _differences(objects[-1], earlier):
        _furnish(api, objects[:-1], earlier.run, [])  # a submitter that was killed may have left it without
        start_again(api, earlier)
        return "resumed"
    return "restarted"


def _is_being_sent(run: Object, now: datetime) -> bool:
    """Whether another submitter may be about to start it. Pure."""
    stopped = STOPPED in (run["metadata"].get("annotations") or {})
    age_s = (now - datetime.fromisoformat(run["metadata"]["creationTimestamp"])).total_seconds()
    return bool(run["spec"].get("suspend")) and not stopped and age_s < SENDING_S


def _differences(run: Object, earlier: Found) -> list[str]:
    """In what two bundles differ."""
    old, new = (one["metadata"].get("annotations") or {} for one in (earlier.run, run))
    return [what for what in BUNDLE if old.get(f"orchestrator/{what}") != new.get(f"orchestrator/{what}")]


def _require_same(run: Object, earlier: Found) -> None:
    differ = _differences(run, earlier)
    if differ:
        rule = f"is under way with another {' and '.join(differ)}"
        way_out = f"orchestrator cancel {earlier.name}, then send it again; or name=ANOTHER"
        raise ConfigError("run_id", earlier.name, rule, way_out)


def create(api: Api, objects: Sequence[Object], before: Found | None = None) -> bool:
    """Create all objects or none; returns whether the run was this call's to create.

    `before`: an ended run of this name, removed once nothing speaks against the new one.

    The run comes first, suspended: its name can be taken once, which decides between two submitters, and what is
    created after it belongs to it from the start. It begins when all is there. What a run of Trainer refers to must
    precede it.
    """
    if before is not None:
        _rehearse(api, objects, before)
        erase(api, before)
    made: list[Made] = []
    try:
        return _create_all(api, objects, made)
    except BaseException:
        for resource, name, uid in reversed(made):
            with suppress(OrchestratorError):
                api.delete(resource, name, uid=uid)
        raise


def _rehearse(api: Api, objects: Sequence[Object], before: Found) -> None:
    """Raises what the server would say to `objects`, and to letting the run go."""
    for obj in objects:
        api.rehearse(obj)
    api.patch(before.resource, before.name, {}, rehearsal=True)


def _create_all(api: Api, objects: Sequence[Object], made: list[Made]) -> bool:
    *parts, run = objects
    made.extend(_replace(api, part) for part in parts if resource_of(part) is TRAINING_RUNTIME)
    owner = _create_run(api, run, made)
    if owner is None:
        return False
    _furnish(api, parts, owner, made)
    if not run["spec"].get("suspend"):
        start_again(api, Found({**owner, "apiVersion": run["apiVersion"], "kind": run["kind"]}))
    return True


def _create_run(api: Api, run: Object, made: list[Made]) -> Object | None:
    """The run as the server keeps it, or None where another submitter was first. Raises Refused."""
    token = uuid.uuid4().hex
    notes = {**(run["metadata"].get("annotations") or {}), SUBMISSION: token}
    sent = {**run, "metadata": {**run["metadata"], "annotations": notes}, "spec": {**run["spec"], "suspend": True}}
    warnings: list[str] = []
    try:
        owner, warnings = _create_patiently(api, sent)
    except Conflict:
        owner = api.get(resource_of(run), run["metadata"]["name"])
        if (owner["metadata"].get("annotations") or {}).get(SUBMISSION) != token:
            return None  # else the repetition of a call met what the call itself had created
    made.append(_made(resource_of(run), owner))
    refused = next((text for text in warnings if "PodSecurity" in text), None)
    if refused:
        raise Refused(f"the pods of {run['metadata']['name']} would be refused: {refused}. Way out: another namespace")
    return owner


def _create_patiently(api: Api, run: Object) -> tuple[Object, list[str]]:
    """Trainer's webhook learns of a new runtime a moment after it was created, and until then refuses its runs."""
    for left in reversed(range(TRIES)):
        try:
            return api.create(run)
        except Refused as error:
            if left == 0 or UNSEEN_RUNTIME not in str(error):
                raise
        time.sleep(PAUSE_S)
    raise AssertionError("the last try returns or raises")


def _furnish(api: Api, parts: Sequence[Object], owner: Object, made: list[Made]) -> None:
    """Create what a run needs and does not have yet; all but the code belongs to it."""
    reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["metadata"]["name"],
                 "uid": owner["metadata"]["uid"]}  # fmt: skip
    for part in parts:
        if resource_of(part) is TRAINING_RUNTIME:
            continue
        if RUN not in part["metadata"]["labels"]:
            _create_shared(api, part, made)
            continue
        owned = {**part, "metadata": {**part["metadata"], "ownerReferences": [reference]}}
        made.append(_replace(api, owned))


def _create_shared(api: Api, part: Object, made: list[Made]) -> None:
    """The code, whose name is its digest: whoever sent it first, it is the same."""
    with suppress(Conflict):
        made.append(_made(resource_of(part), api.create(part)[0]))


def _replace(api: Api, part: Object) -> Made:
    """Create an object in the place of one that another life of the run left behind; its own one stays."""
    resource, name = resource_of(part), part["metadata"]["name"]
    wanted = part["metadata"].get("ownerReferences")
    for left in reversed(range(TRIES)):
        try:
            return _made(resource, api.create(part)[0])
        except Conflict:
            if left == 0:
                raise
        found = api.find(resource, name)
        if found is not None:
            if wanted and wanted[0]["uid"] in (o["uid"] for o in found["metadata"].get("ownerReferences", ())):
                return _made(resource, found)
            api.delete(resource, name, uid=found["metadata"]["uid"])
        time.sleep(PAUSE_S)
    raise AssertionError("the last try returns or raises")


def _made(resource: Resource, obj: Object) -> Made:
    return resource, str(obj["metadata"]["name"]), str(obj["metadata"]["uid"])
