"""Pods that the server refused to make: quotas, limits, Pod Security, webhooks, names that are not there. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from orchestrator.cluster.kubernetes.pods import is_active
from orchestrator.cluster.kubernetes.resources import RUN
from orchestrator.cluster.why.cause import Cause, Evidence, Stage, shown
from orchestrator.cluster.why.scene import Object, Scene, condition, of_condition, of_event, of_object, seconds, when

REASONS = (
    "FailedCreate", "JobCreationFailed", "HeadlessServiceCreationFailed", "FailedToCreateHeadPod",
    "FailedToCreateWorkerPod", "FailedToCreateRayCluster", "FailedToCreateRayJobSubmitter", "InvalidRayJobSpec",
    "InvalidRayJobMetadata", "InvalidRayClusterSpec", "ErrCreateWorkload",
)  # fmt: skip
"""Of events by which a controller says that it could not make something."""
QUOTA = re.compile(
    r"exceeded quota: (?P<name>\S+), requested: (?P<asked>\S+), used: (?P<used>\S+), limited: (?P<most>[^\s:]\S*)"
)
UNSAID = re.compile(r"failed quota: (?P<name>[^:]+): must specify (?P<what>.+)")
LIMIT = re.compile(
    r"(?P<which>maximum|minimum) (?P<resource>\S+) usage per (?P<level>\w+) is (?P<bound>\S+?)[,.]\s+"
    r"(?:but (?P<field>request|limit) is (?P<value>\S+?)\.?(?=[\s,\]]|$)|No (?P<unsaid>request|limit) is specified)"
)
POD_SECURITY = re.compile(r'violates PodSecurity "(?P<level>[^"]+)": (?P<rules>.+)')
DENIED = re.compile(
    r"(?P<what>admission webhook|ValidatingAdmissionPolicy) ['\"](?P<name>[^'\"]+)['\"] (?:with binding '[^']+' )?"
    r"denied (?:the )?request:? ?(?P<why>.*)",
    re.DOTALL,
)
DOWN = re.compile(r'failed calling webhook "(?P<name>[^"]+)": (?P<why>.*)', re.DOTALL)
ACCOUNT = re.compile(r'serviceaccount "(?P<name>[^"]+)" not found')
PRIORITY = re.compile(r"no PriorityClass with name (?P<name>\S+) was found")
RULE = re.compile(r"(?P<rule>[\w .!=/\"]+?) \(")
MOST_NEIGHBOURS = 4
Told = tuple[str, str, str, bool]
"""Name of the cause, its sentence, the way out, whether it may pass by itself."""


def causes(scene: Scene) -> Iterator[Cause]:
    """What the newest refusal says, for each object that still lacks what it could not make."""
    for obj in (scene.run, *scene.children, *_unread_children(scene)):
        refusals = scene.events_of(obj, *REASONS)
        if refusals and not _made_since(scene, obj, refusals[-1]):
            yield _cause(scene, refusals[-1])
    yield from _failed_run(scene)


def _unread_children(scene: Scene) -> list[Object]:
    """Of controllers, objects that there was no right to read, by what was said of them."""
    known = {scene.name, *(one["metadata"]["name"] for one in (*scene.children, *scene.pods))}
    about = [event.get("involvedObject") or {} for event in scene.events if event.get("reason") in REASONS]
    names = {str(one.get("name")): one for one in about if one.get("name") not in known}
    return [{"kind": one.get("kind"), "metadata": {"name": name, "uid": one.get("uid")}} for name, one in names.items()]


def _made_since(scene: Scene, obj: Object, refusal: Object) -> bool:
    """Whether all that was to be made is there, or something newer than the refusal."""
    if scene.settled:
        return True
    uid, spec = obj["metadata"].get("uid"), obj.get("spec") or {}
    mine = [one for one in scene.pods if _owned(one, uid)]
    wanted = int(spec.get("parallelism") or 1) if obj["kind"] == "Job" else 1
    children = [one for one in scene.children if _owned(one, uid)]
    made = mine if obj["kind"] in ("Job", "RayCluster") else [*children, *mine]
    if obj["kind"] == "Job" and len([pod for pod in mine if pod in scene.active]) >= wanted:
        return True
    newest = max((seconds(one["metadata"].get("creationTimestamp") or "") for one in made), default=0.0)
    return newest > when(refusal)


def _owned(obj: Object, uid: object) -> bool:
    return any(owner.get("uid") == uid for owner in obj["metadata"].get("ownerReferences") or ())


def _failed_run(scene: Scene) -> Iterator[Cause]:
    """A TrainJob or RayJob whose operator says that it cannot be made into anything."""
    for kind in ("Failed", "Suspended"):
        found = condition(scene.run, kind) if scene.run["kind"] == "TrainJob" else None
        if found and found["status"] == "True" and found.get("reason") == "TrainingRuntimeNotSupported":
            said = f"Trainer cannot run it: {shown(found.get('message', ''))}"
            yield Cause("refused", said, "cluster.kind=jobset", Stage.creation, (of_condition(scene.run, found),))
    status = scene.run.get("status") or {}
    if status.get("jobDeploymentStatus") == "ValidationFailed":
        said = f"KubeRay refuses it: {shown(status.get('message') or status.get('reason') or 'it says no more')}"
        proof = of_object(scene.run, "status.jobDeploymentStatus", "ValidationFailed")
        yield Cause(
            "refused", said, "another version of the operator, or cluster.kind=jobset", Stage.creation, (proof,)
        )


def _cause(scene: Scene, refusal: Object) -> Cause:
    text, proof = str(refusal.get("message") or ""), of_event(refusal)
    for judge in (_quota, _unsaid, _limit, _pod_security, _denied, _down, _account, _priority):
        told = judge(scene, text)
        if told:
            name, said, way_out, passes = told
            extra = _looked_up(scene, name, text)
            at = str(refusal.get("firstTimestamp") or refusal.get("eventTime") or "")
            return Cause(name, said, way_out, Stage.creation, (proof, *extra), passes=passes, at=at)
    said = f"the cluster refuses to make its objects: {shown(text.removeprefix('Error creating: '))}"
    return Cause("refused", said, "change what it names, then submit again", Stage.creation, (proof,))


def _quota(scene: Scene, text: str) -> Told | None:
    found = QUOTA.search(text)
    if not found:
        return None
    asked, used, most = (_pairs(found[key]) for key in ("asked", "used", "most"))
    parts = [
        f"{asked[key]} of {key}, and {used.get(key, '0')} of {most[key]} are taken" for key in asked if key in most
    ]
    said = (
        f"quota {found['name']} of namespace {scene.snapshot.namespace} is used up: a pod needs {'; '.join(parts)}"
        f"{_neighbours(scene)}"
    )
    way_out = (
        "an end of other runs (orchestrator cancel), whose room it takes by itself; fewer or smaller pods; more quota"
    )
    return "quota-exceeded", said, way_out, False


def _neighbours(scene: Scene) -> str:
    """The other runs with pods in the namespace, the largest first."""
    here = [pod for pod in scene.snapshot.of("Pod") if pod["metadata"].get("namespace") == scene.snapshot.namespace]
    labels = [(pod["metadata"].get("labels") or {}).get(RUN) for pod in here if is_active(pod)]
    held = Counter(name for name in labels if name and name != scene.name)
    shown = [f"{name} ({count} {'pod' if count == 1 else 'pods'})" for name, count in held.most_common(MOST_NEIGHBOURS)]
    return f"; by {', '.join(shown)}{' and others' if len(held) > len(shown) else ''}" if shown else ""


def _unsaid(scene: Scene, text: str) -> Told | None:
    found = UNSAID.search(text)
    if not found:
        return None
    said = f"quota {found['name']} counts what a container does not state: {shown(found['what'])}"
    return (
        "quota-exceeded",
        said,
        "let a LimitRange of the namespace give defaults, or take that out of the quota",
        False,
    )


def _limit(scene: Scene, text: str) -> Told | None:
    found = LIMIT.search(text)
    if not found:
        return None
    value = f"the {found['field']} is {found['value']}" if found["value"] else f"no {found['unsaid']} is stated"
    said = (
        f"a LimitRange of namespace {scene.snapshot.namespace} allows at the {found['which']} {found['bound']} "
        f"{found['resource']} per {found['level']}, and {value}"
    )
    keys = {"memory": "cluster.memory_gib_per_process", "cpu": "cluster.cpus_per_process"}
    key = keys.get(found["resource"], "compute.num_processes")
    return "limit-range", said, f"another {key}, or another namespace", False


def _pod_security(scene: Scene, text: str) -> Told | None:
    found = POD_SECURITY.search(text)
    if not found:
        return None
    rules = [" ".join(rule["rule"].split()).strip(', "') for rule in RULE.finditer(found["rules"])]
    said = f"Pod Security level {found['level']} forbids its pods: {', '.join(rules) or shown(found['rules'])}"
    return "pod-security", said, "cluster.rdma=null, or a namespace whose level allows this", False


def _denied(scene: Scene, text: str) -> Told | None:
    found = DENIED.search(text)
    if not found:
        return None
    why = shown(found["why"]) or "it says no more"
    return "webhook-refusal", f"{found['what']} {found['name']} refuses its pods: {why}", "do what it asks for", False


def _down(scene: Scene, text: str) -> Told | None:
    found = DOWN.search(text)
    if not found:
        return None
    said = f"admission webhook {found['name']} does not answer, so nothing is made: {shown(found['why'])}"
    return "webhook-down", said, "wait, and let the operator of the cluster look at its webhook", True


def _account(scene: Scene, text: str) -> Told | None:
    found = ACCOUNT.search(text)
    if not found:
        return None
    said = f"namespace {scene.snapshot.namespace} has no service account {found['name']}"
    return "account-missing", said, "cluster.service_account=null, or create it", False


def _priority(scene: Scene, text: str) -> Told | None:
    found = PRIORITY.search(text)
    if not found:
        return None
    every = sorted(one["metadata"]["name"] for one in scene.snapshot.of("PriorityClass"))
    names = ", ".join(name for name in every if not name.startswith("system-")) or "none is known here"
    said = f"the cluster has no PriorityClass {found['name']}"
    return "priority-missing", said, f"another cluster.priority ({names})", False


def _looked_up(scene: Scene, name: str, text: str) -> list[Evidence]:
    """The object that the refusal speaks of, as it stands."""
    if name == "quota-exceeded" and (found := QUOTA.search(text)):
        quota = scene.named("ResourceQuota", found["name"])
        status = (quota or {}).get("status") or {}
        keys = list(_pairs(found["asked"]))
        used = ", ".join(
            f"{key}: {status.get('used', {}).get(key)} of {status.get('hard', {}).get(key)}" for key in keys
        )
        return [of_object({**quota, "kind": "ResourceQuota"}, "status.used", used)] if quota else []
    if name == "limit-range" and (found := LIMIT.search(text)):
        return list(_ranges(scene, found))
    if name == "pod-security":
        space = scene.named("Namespace", scene.snapshot.namespace)
        key = "pod-security.kubernetes.io/enforce"
        level = ((space or {}).get("metadata") or {}).get("labels", {}).get(key)
        return [of_object({**space, "kind": "Namespace"}, f"metadata.labels[{key}]", level)] if space and level else []
    return []


def _ranges(scene: Scene, found: re.Match[str]) -> Iterator[Evidence]:
    key = {"maximum": "max", "minimum": "min"}[found["which"]]
    for one in scene.snapshot.of("LimitRange"):
        for item in (one.get("spec") or {}).get("limits") or []:
            bound = (item.get(key) or {}).get(found["resource"])
            if item.get("type") == found["level"] and bound is not None:
                field = f"spec.limits[{found['level']}].{key}.{found['resource']}"
                yield of_object({**one, "kind": "LimitRange"}, field, bound)


def _pairs(text: str) -> dict[str, str]:
    """`requests.cpu=2,pods=1` by name."""
    return {key: value for key, _, value in (pair.partition("=") for pair in text.rstrip(".").split(",")) if value}
