"""Kueue: a run that no queue lets in, one that was put out again, and behind what it waits. Pure.

Kueue's messages are those of 0.10; what they name is looked up in the queue, so that the numbers are the queue's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster.forecast.amounts import short
from orchestrator.cluster.kubernetes.resources import STOPPED
from orchestrator.cluster.kubernetes.states import QUEUE, queue_of
from orchestrator.cluster.why.cause import Cause, Depth, Evidence, Stage, shown
from orchestrator.cluster.why.scene import Object, Scene, condition, of_condition, of_object, seconds
from orchestrator.cluster.why.turns import ahead, cluster_queue_name, holders, holding, owner_of, priority, quota_of

NEVER = re.compile(
    r"insufficient quota for (?P<resource>\S+) in flavor (?P<flavor>\S+), "
    r"request > maximum capacity \((?P<asked>\S+) > (?P<most>[^)]+)\)"
)
LACKS = re.compile(
    r"insufficient unused quota for (?P<resource>\S+) in flavor (?P<flavor>\S+), (?P<more>\S+) more needed"
)
SHUT = re.compile(r"(?P<kind>LocalQueue|ClusterQueue) (?P<name>\S+) (?P<how>doesn't exist|is inactive|not found)")
UID = re.compile(r"\(UID: (?P<uid>[^)]+)\)")
NOTICE_S = 30.0
"""In which Kueue takes note of a run."""
CLOSED = "Workload namespace doesn't match ClusterQueue selector"


def causes(scene: Scene) -> Iterator[Cause]:
    queue, workload = queue_of(scene.run), scene.workload
    if queue is None or STOPPED in (scene.run["metadata"].get("annotations") or {}):
        return
    if workload is None:
        yield from _unnoticed(scene, queue)
        return
    if scene.state.state in ("done", "failed"):
        return
    put_out = list(_put_out(scene, workload))
    yield from put_out
    yield from _checks(scene, workload)
    reserved = condition(workload, "QuotaReserved")
    if reserved is None or reserved["status"] == "True":
        if reserved is None and not put_out:
            yield _full(scene, workload, queue, "", Depth.root)
        return
    yield from _held(scene, workload, queue, str(reserved.get("message") or ""), bool(put_out))


def _unnoticed(scene: Scene, queue: str) -> Iterator[Cause]:
    """No record of Kueue's: it is not there, or does not know the kind."""
    if scene.snapshot.unread("Workload") and "serve" not in (scene.snapshot.unread("Workload") or ""):
        return
    age = scene.now - seconds(scene.run["metadata"].get("creationTimestamp") or "")
    if not (scene.run.get("spec") or {}).get("suspend") or age < NOTICE_S:
        return
    kind = scene.run["kind"]
    yield Cause(
        "queue-ignores-it",
        f"queue {queue} has taken no note of this {kind} in {age:.0f} s: Kueue is not running, or does not know {kind}",
        f"orchestrator cancel {scene.name}, then cluster.queue=null, or let the operator of the cluster look at Kueue",
        Stage.queue,
        (
            of_object(scene.run, f"metadata.labels[{QUEUE}]", queue),
            Evidence("Workload", "ownerReferences", f"none names {kind} {scene.name}"),
        ),
    )


def _held(scene: Scene, workload: Object, queue: str, message: str, was_put_out: bool) -> Iterator[Cause]:
    """By what Kueue said when it last looked at the run."""
    shut = SHUT.search(message)
    proof = of_condition(workload, condition(workload, "QuotaReserved") or {"type": "QuotaReserved", "status": ""})
    if shut:
        yield from _shut(scene, shut, proof)
    elif CLOSED in message:
        name = cluster_queue_name(scene, queue)
        yield Cause(
            "queue-closed",
            f"queue {queue} is of ClusterQueue {name}, which takes nothing from namespace {scene.snapshot.namespace}",
            "another cluster.queue or cluster.namespace, or let the operator add the namespace to its selector",
            Stage.queue,
            (proof,),
        )
    elif too_small := _too_small(message):
        yield _small(scene, queue, too_small, proof)
    else:
        yield _full(scene, workload, queue, message, Depth.follows if was_put_out else Depth.root, proof)


def _too_small(message: str) -> re.Match[str] | None:
    """The first shortage that nothing mends, if no flavor could ever take the run."""
    never, lacks = list(NEVER.finditer(message)), list(LACKS.finditer(message))
    hopeless = {found["flavor"] for found in never}
    return never[0] if never and all(found["flavor"] in hopeless for found in lacks) else None


def _small(scene: Scene, queue: str, found: re.Match[str], proof: Evidence) -> Cause:
    what = short(found["resource"])
    name = cluster_queue_name(scene, queue)
    return Cause(
        "queue-too-small",
        f"queue {queue} can never hold this run: it asks for {found['asked']} {what}, and flavor {found['flavor']} of "
        f"ClusterQueue {name} has at most {found['most']}",
        f"at most {found['most']} {what}: a smaller compute.num_processes or compute.num_nodes, or another "
        "cluster.queue",
        Stage.queue,
        (proof, *quota_of(scene, name, found["flavor"], found["resource"])),
    )


def _full(
    scene: Scene, workload: Object, queue: str, message: str, depth: Depth, proof: Evidence | None = None
) -> Cause:
    """No room now: who has it, and who waits before."""
    name = cluster_queue_name(scene, queue)
    having, first = holders(scene, name), ahead(scene, workload, name)
    lacks = [f"{found['more']} {short(found['resource'])}" for found in LACKS.finditer(message)]
    parts = [f"queue {queue} has no room now" + (f": {', '.join(dict.fromkeys(lacks))} more needed" if lacks else "")]
    if having:
        more = f" and {len(having) - 3} more" if len(having) > 3 else ""
        parts.append(f"held by {', '.join(map(holding, having[:3]))}{more}")
    if first:
        parts.append(f"{len(first)} before it: {', '.join(map(owner_of, first[:3]))}{' ...' if first[3:] else ''}")
    found = LACKS.search(message)
    used = quota_of(scene, name, found["flavor"], found["resource"]) if found else []
    return Cause(
        "queue-full",
        "; ".join(parts),
        "wait, or a higher cluster.priority, fewer processes, another cluster.queue",
        Stage.queue,
        (proof or of_object(workload, "spec.queueName", queue), *used),
        depth,
        passes=True,
    )


def _shut(scene: Scene, shut: re.Match[str], proof: Evidence) -> Iterator[Cause]:
    kind, name = shut["kind"], shut["name"]
    if shut["how"] != "is inactive":
        yield Cause(
            "queue-missing",
            f"there is no {kind} {name}",
            "name a queue that is there: cluster.queue=... (kubectl get localqueues)",
            Stage.queue,
            (proof,),
        )
        return
    found = scene.named(kind, name) or {}
    held = (found.get("spec") or {}).get("stopPolicy")
    active = condition(found, "Active") if found else None
    reason = f" ({active['message']})" if active and active.get("message") else ""
    extra = tuple(of_condition({**found, "kind": kind}, active) for _ in (1,) if active)
    yield Cause(
        "queue-stopped",
        f"{kind} {name} lets nothing in{reason}",
        "wait until its operator starts it again, or name another cluster.queue",
        Stage.queue,
        (proof, *extra),
        passes=held in ("Hold", "HoldAndDrain"),
    )


def _put_out(scene: Scene, workload: Object) -> Iterator[Cause]:
    """A run that had been admitted and lost its place."""
    evicted = condition(workload, "Evicted")
    if evicted is None or evicted["status"] != "True":
        return
    reason, at = evicted.get("reason") or "", evicted.get("lastTransitionTime") or ""
    if reason == "Preempted":
        yield _preempted(scene, workload, condition(workload, "Preempted") or evicted, at)
        return
    told = {
        "PodsReadyTimeout": (
            "its pods were not all ready in the time that Kueue gives them",
            "look at the causes below",
        ),
        "ClusterQueueStopped": ("its ClusterQueue was stopped", "wait until its operator starts it again"),
        "LocalQueueStopped": ("its LocalQueue was stopped", "wait until its operator starts it again"),
        "AdmissionCheck": ("an admission check took its admission back", "look at the check"),
    }
    known = next((told[key] for key in told if reason.startswith(key)), None)
    said, way_out = known or (f"Kueue put it out ({reason})", f"orchestrator resume {scene.name}")
    name = "deactivated" if known is None else "pods-not-ready" if reason == "PodsReadyTimeout" else "queue-stopped"
    yield Cause(name, said, way_out, Stage.queue, (of_condition(workload, evicted),), passes=known is not None, at=at)


def _preempted(scene: Scene, workload: Object, found: Object, at: str) -> Cause:
    uid = UID.search(str(found.get("message") or ""))
    others = {one["metadata"].get("uid"): one for one in scene.snapshot.of("Workload")}
    other = others.get(uid["uid"]) if uid else None
    who = f"by {owner_of(other)}" if other else "by another run"
    mine, theirs = priority(workload), priority(other) if other else None
    why = f" (priority {theirs} over {mine})" if theirs is not None and theirs != mine else ""
    proof = [of_condition(workload, found)]
    if other:
        proof.append(of_object({**other, "kind": "Workload"}, "spec.priority", theirs))
    return Cause(
        "preempted",
        f"it was preempted {who}{why} and goes on when its queue has room again",
        "wait: it goes on from its last save; or a higher cluster.priority",
        Stage.queue,
        tuple(proof),
        passes=True,
        at=at,
    )


def _checks(scene: Scene, workload: Object) -> Iterator[Cause]:
    for check in (workload.get("status") or {}).get("admissionChecks") or []:
        if check.get("state") in ("Ready", None):
            continue
        state = check["state"]
        yield Cause(
            "admission-check",
            f"admission check {check['name']} is {state}: {shown(check.get('message') or 'it says no more')}",
            "look at the controller of the check, or name another cluster.queue",
            Stage.queue,
            (of_object(workload, f"status.admissionChecks[{check['name']}]", f"{state}: {check.get('message', '')}"),),
            passes=state in ("Pending", "Retry"),
        )
