"""Pods that ended: for memory, evicted, preempted, on lost nodes, out of time, or by their own words. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from orchestrator.cluster.kubernetes.pods import End, end_of, is_active, statuses
from orchestrator.cluster.kubernetes.states import has_ended
from orchestrator.cluster.lines import LAST_WORDS, last_words
from orchestrator.cluster.why.cause import Cause, Depth, Evidence, Stage
from orchestrator.cluster.why.scene import (
    Object,
    Scene,
    condition,
    of_condition,
    of_event,
    of_object,
    seconds,
)  # fmt: skip
from orchestrator.cluster.why.words import Said, by_words
from orchestrator.errors import EXIT_STOPPED, EXIT_TERMINATED

UID = re.compile(r"Preempted by \w+ (?P<uid>[0-9a-f-]{8,}) on node (?P<node>\S+)")
LOW = re.compile(r"low on resource: (?P<what>[\w-]+)")
FULL = re.compile(
    r"Pod ephemeral local storage usage exceeds the total limit of containers (?P<pod>\S+?)\.? "
    r"|EmptyDir volume \"(?P<volume>[^\"]+)\" exceeds the limit \"(?P<limit>[^\"]+)\""
    r"|Container (?P<container>\S+) exceeded its local ephemeral storage limit \"(?P<own>[^\"]+)\""
)
GONE = ("DeletionByTaintManager", "DeletionByPodGC")
DEADLINES = ("DeadlineExceeded", "JobDeploymentStatusTransitionGracePeriodExceeded")


def causes(scene: Scene) -> Iterator[Cause]:
    yield from _deadline(scene)
    yield from _on_ray(scene)
    yield from _nodes(scene)
    yield from _put_off_without_a_trace(scene)
    newest = _newest_attempt(scene.pods)
    for pod in scene.pods:
        end = end_of(pod)
        past = scene.settled or (end is not None and (end.attempt or newest) < newest)
        disrupted = condition(pod, "DisruptionTarget")
        if _killed_for_memory(pod):
            yield _out_of_memory(scene, pod, scene.settled)
        elif (pod.get("status") or {}).get("reason") == "Evicted":
            yield _evicted(pod, past)
        elif disrupted and disrupted["status"] == "True":
            yield _disrupted(scene, pod, disrupted, past)
        elif end is not None and end.exit_code and not (is_active(pod) and scene.settled):
            yield from _told(pod, end, past)


def _newest_attempt(pods: Sequence[Object]) -> int:
    return max((end.attempt or 0 for pod in pods if (end := end_of(pod))), default=0)


def _told(pod: Object, end: End, past: bool) -> Iterator[Cause]:
    """By its last words, or by its code alone."""
    if end.exit_code in (EXIT_STOPPED, EXIT_TERMINATED) and not end.error:
        return
    ended = [
        one
        for one in (*statuses(pod, "initContainerStatuses"), *statuses(pod))
        if one.get("state", {}).get("terminated")
    ]
    bad = next((one for one in ended if one["state"]["terminated"].get("exitCode")), None)
    if bad is not None and bad["state"]["terminated"].get("reason") in ("StartError", "ContainerCannotRun"):
        return
    who = f"rank {end.rank}" if end.rank is not None else f"pod {end.pod}"
    field = f"status.containerStatuses[{bad['name']}].state.terminated" if bad else "status"
    value = f"exit code {end.exit_code}" + (f": {end.error}" if end.error else "")
    yield by_words(Said(end.error or "", end.exit_code, who, of_object(pod, field, value), past=past, at=end.at))


def _killed_for_memory(pod: Object) -> Object | None:
    """The container that the kernel killed at its limit, now or the last time that it ran."""
    for one in (*statuses(pod, "initContainerStatuses"), *statuses(pod)):
        for key in ("state", "lastState"):
            if ((one.get(key) or {}).get("terminated") or {}).get("reason") == "OOMKilled":
                return one
    return None


def _out_of_memory(scene: Scene, pod: Object, past: bool) -> Cause:
    one = _killed_for_memory(pod) or {}
    every = [*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"]]
    spec = next((each for each in every if each["name"] == one.get("name")), every[0])
    limit = ((spec.get("resources") or {}).get("limits") or {}).get("memory")
    predicted = scene.record.get("predicted") or {}
    extra = f"; predicted: {predicted['memory']}" if predicted else ""
    enough = f" (cluster.memory_gib_per_process={predicted['gib_per_process']:g} should do)" if predicted else ""
    had = f" of {limit}" if limit else ", which the node as a whole had no more of"
    ended = ((one.get("state") or {}).get("terminated") or (one.get("lastState") or {}).get("terminated")) or {}
    field = f"status.containerStatuses[{one.get('name')}].state.terminated"
    proof = [of_object(pod, field, f"OOMKilled, exit code {ended.get('exitCode')}")]
    proof += [of_object(pod, f"spec.containers[{spec['name']}].resources.limits.memory", limit)] if limit else []
    return Cause(
        "out-of-memory",
        f"the kernel killed container {one.get('name')} at its memory limit{had}{extra}",
        f"a larger cluster.memory_gib_per_process{enough}, fewer data.num_workers, or fewer processes a node",
        Stage.training,
        tuple(proof),
        past=past,
        at=str(ended.get("finishedAt") or ""),
        whom=(pod["metadata"]["name"],),
    )


def _evicted(pod: Object, past: bool) -> Cause:
    """By the node, because it or the pod used too much of something."""
    text = str(pod["status"].get("message") or "")
    low, full = LOW.search(text), FULL.search(text + " ")
    proof = of_object(pod, "status.message", f"Evicted: {text}")
    whom = (pod["metadata"]["name"],)
    if full:
        place = f"emptyDir {full['volume']}" if full["volume"] else "its own disk"
        limit = full["limit"] or full["pod"] or full["own"]
        said = f"the node evicted it for filling {place} beyond {limit}"
        way_out = "a larger cluster.disk_gib, a smaller data.cache_gib, or runs_dir on a claim"
        return Cause("disk-full", said, way_out, Stage.training, (proof,), past=past, whom=whom)
    what = low["what"] if low else "something"
    name = "disk-full" if what == "ephemeral-storage" else "evicted"
    node = pod["spec"].get("nodeName", "")
    said = f"node {node} evicted it: the node itself ran low on {what}"
    way_out = (
        "wait, it goes on elsewhere; or a request that says what it needs (cluster.disk_gib, memory_gib_per_process)"
    )
    return Cause(name, said, way_out, Stage.training, (proof,), passes=True, past=past, whom=whom)


def _disrupted(scene: Scene, pod: Object, found: Object, past: bool) -> Cause:
    """By somebody who said why in the pod's condition."""
    reason, node = found.get("reason") or "", pod["spec"].get("nodeName", "")
    proof, whom = [of_condition(pod, found)], (pod["metadata"]["name"],)
    at = str(found.get("lastTransitionTime") or "")
    if reason == "PreemptionByScheduler":
        return _preempted(scene, pod, past, at)
    if reason in GONE:
        name, said, way_out = (
            "node-lost",
            f"node {node} is gone or does not answer",
            "wait: it starts again on other nodes",
        )
    elif reason == "EvictionByEvictionAPI":
        name, said = "drained", f"somebody evicted it from node {node}, as `kubectl drain` does"
        way_out = "wait: it goes on from its last save, elsewhere"
    else:
        name, said = "evicted", f"node {node} ended it ({reason}: {found.get('message', '')})"
        way_out = "wait: it goes on from its last save"
    return Cause(name, said, way_out, Stage.training, tuple(proof), passes=True, past=past, at=at, whom=whom)


def _preempted(scene: Scene, pod: Object, past: bool, at: str) -> Cause:
    """By the scheduler for a pod of higher priority, whose uid an event tells."""
    events = scene.events_of(pod, "Preempted")
    found = UID.search(str(events[-1].get("message") or "")) if events else None
    other = next(
        (one for one in scene.snapshot.of("Pod") if found and one["metadata"].get("uid") == found["uid"]), None
    )
    mine, who, why = pod["spec"].get("priority") or 0, "a pod of higher priority", ""
    if other is not None:
        who, theirs = f"pod {other['metadata']['name']}", other["spec"].get("priority") or 0
        why = f" (priority {theirs} over {mine})"
    proof: list[Evidence] = [of_event(events[-1])] if events else []
    disrupted = condition(pod, "DisruptionTarget")
    proof += [of_condition(pod, disrupted)] if disrupted else []
    said = f"it was preempted by {who}{why}"
    way_out = "wait: it goes on from its last save; or a higher cluster.priority"
    whom = (pod["metadata"]["name"],)
    evidence, lost = tuple(proof), float("inf")  # the place that it lost comes before the one that it does not get
    return Cause(
        "preempted", said, way_out, Stage.placing, evidence, passes=True, past=past, weight=lost, at=at, whom=whom
    )


def _put_off_without_a_trace(scene: Scene) -> Iterator[Cause]:
    """Pods that are gone, of which an event remains."""
    here = {pod["metadata"]["name"] for pod in scene.pods}
    for event in scene.events:
        about = event.get("involvedObject") or {}
        if event.get("reason") != "Preempted" or about.get("kind") != "Pod" or about.get("name") in here:
            continue
        gone: Object = {
            "kind": "Pod",
            "metadata": {"name": about["name"], "uid": about.get("uid")},
            "spec": {},
            "status": {},
        }
        newer = any(seconds(pod["metadata"].get("creationTimestamp") or "") for pod in scene.active)
        yield _preempted(scene, gone, scene.settled and newer, str(event.get("lastTimestamp") or ""))


def _nodes(scene: Scene) -> Iterator[Cause]:
    """Nodes under living pods that are gone or do not answer."""
    if scene.snapshot.unread("Node"):
        return
    for pod in scene.active:
        name = pod["spec"].get("nodeName")
        node = scene.named("Node", name) if name else None
        ready = condition(node, "Ready") if node else None
        if not name or (node is not None and (ready is None or ready["status"] == "True")):
            continue
        said = f"node {name} is not there any more" if node is None else f"node {name} does not answer"
        proof = (
            of_object(pod, "spec.nodeName", name)
            if node is None or ready is None
            else of_condition({**node, "kind": "Node"}, ready)
        )
        way_out = "wait: its pods are made again elsewhere once the cluster gives the node up (kubectl delete node)"
        whom = (pod["metadata"]["name"],)
        at = str((ready or {}).get("lastTransitionTime") or "")
        yield Cause("node-lost", said, way_out, Stage.training, (proof,), passes=True, whom=whom, at=at)


def _deadline(scene: Scene) -> Iterator[Cause]:
    """The controller ended the run for its time."""
    for obj in (scene.run, *scene.children):
        failed = condition(obj, "Failed")
        status = obj.get("status") or {}
        if failed and failed["status"] == "True" and failed.get("reason") == "DeadlineExceeded":
            proof = of_condition(obj, failed)
        elif obj["kind"] == "RayJob" and status.get("reason") in DEADLINES:
            proof = of_object(obj, "status.reason", f"{status['reason']}: {status.get('message', '')}")
        else:
            continue
        limit = (obj.get("spec") or {}).get("activeDeadlineSeconds") or _inner_limit(obj)
        had = f" of {limit} s" if limit else ""
        begun = any(map(end_of, scene.pods)) or any(event.get("reason") == "Started" for event in scene.events)
        depth = Depth.root if begun or not scene.warnings else Depth.follows
        said = f"it was ended at its deadline{had}"
        way_out = f"a larger cluster.deadline_s, then orchestrator resume {scene.name}"
        yield Cause("deadline", said, way_out, Stage.end, (proof,), depth)
        return


def _on_ray(scene: Scene) -> Iterator[Cause]:
    """A driver's last words, which outlive its pod in the status of the RayJob."""
    status = scene.run.get("status") or {}
    if scene.run["kind"] != "RayJob" or scene.state.state != "failed" or status.get("reason") in DEADLINES:
        return
    message = str(status.get("message") or "")
    words = last_words(message)
    lines = [line for line in message.splitlines() if line.strip() and not line.startswith(LAST_WORDS)]
    text = str(words.get("error") or (lines[-1] if lines else ""))
    rank, code = words.get("rank"), words.get("exit_code") or scene.state.exit_code
    proof = of_object(scene.run, "status.message", text or message)
    if text or code:
        yield by_words(Said(text, code, "the run" if rank is None else f"rank {rank}", proof))


def _inner_limit(obj: Object) -> int | None:
    jobs = (obj.get("spec") or {}).get("replicatedJobs") or []
    return next((job["template"]["spec"].get("activeDeadlineSeconds") for job in jobs), None)


def verdict_of_controller(scene: Scene) -> Iterator[Cause]:
    """What remains where nothing else explains an end: the words of whoever ended the run."""
    failed = condition(scene.run, "Failed")
    if not has_ended(scene.run) or scene.state.state != "failed":
        return
    proof = (
        (of_condition(scene.run, failed),) if failed else (of_object(scene.run, "status", scene.state.reason or ""),)
    )
    reason = scene.state.reason or "its controller says no more"
    way_out = f"orchestrator logs {scene.name}"
    yield Cause("failed", f"it failed: {reason}", way_out, Stage.end, proof, Depth.follows)
