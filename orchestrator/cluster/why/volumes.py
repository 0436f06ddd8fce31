"""Claims, secrets and config maps that a pod waits for once it has a node, or before. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster.kubernetes.pods import is_running, statuses
from orchestrator.cluster.why.cause import Cause, Evidence, Stage, shown
from orchestrator.cluster.why.scene import (
    Object,
    Scene,
    begun,
    claims_of,
    condition,
    of_condition,
    of_event,
    of_object,
    seconds,
    when,
)  # fmt: skip

MOUNTS = ("FailedMount", "FailedAttachVolume", "FailedMapVolume", "FailedCreatePodSandBox", "Failed")
MISSING = re.compile(r'(?P<kind>secret|configmap|persistentvolumeclaim) "(?P<name>[^"]+)" not found')
NO_KEY = re.compile(
    r"(?:references non-existent (?P<what>secret|config) key: (?P<key>\S+)"
    r"|couldn't find key (?P<key2>\S+) in (?P<what2>Secret|ConfigMap) \S+?/(?P<name>[\w.-]+))"
)
VOLUME = re.compile(r'for volume "(?P<volume>[^"]+)"')
KINDS = {
    "secret": ("secret-missing", "Secret", "tracking.secret, cluster.store_secret or cluster.pull_secrets"),
    "configmap": ("config-map-missing", "ConfigMap", "the submission"),
    "persistentvolumeclaim": ("claim-missing", "PersistentVolumeClaim", "cluster.volumes"),
}
UNBOUND = ("unbound immediate PersistentVolumeClaims", "available persistent volumes to bind", "non-existent pv")


def causes(scene: Scene) -> Iterator[Cause]:
    claims = list(_claims(scene))
    yield from claims
    for pod in scene.active:
        if is_running(pod) and begun(pod):
            continue
        found = condition(pod, "PodScheduled")
        text = str((found or {}).get("message") or "")
        if found and found["status"] == "False" and (missing := MISSING.search(text)):
            yield _missing(scene, pod, missing["kind"], missing["name"], of_condition(pod, found))
        elif found and found["status"] == "False" and not claims and _is_of_volumes(text):
            said = f"no node can reach the volumes of its claims: {shown(text)}"
            way_out = "claims whose volumes are in one zone, or a storage class that all nodes reach"
            yield Cause("claim-unreachable", said, way_out, Stage.volumes, (of_condition(pod, found),))
        yield from _mounts(scene, pod)


def _is_of_volumes(text: str) -> bool:
    return any(words in text for words in (*UNBOUND, "PersistentVolume's node affinity", "volume zone", "free storage"))


def _claims(scene: Scene) -> Iterator[Cause]:
    """Claims of pods that have not begun, by what the claims themselves say."""
    waiting = [pod for pod in scene.active if not begun(pod)]
    for name in claims_of(waiting):
        claim = scene.named("PersistentVolumeClaim", name)
        if claim is None:
            if not scene.snapshot.unread("PersistentVolumeClaim"):
                yield _missing(scene, waiting[0], "persistentvolumeclaim", name, None)
            continue
        phase = (claim.get("status") or {}).get("phase")
        if phase == "Lost":
            proof = of_object({**claim, "kind": "PersistentVolumeClaim"}, "status.phase", phase)
            yield Cause(
                "claim-lost", f"claim {name} has lost its volume", "name another claim", Stage.volumes, (proof,)
            )
        elif phase == "Pending":
            yield from _unbound(scene, name, claim)


def _unbound(scene: Scene, name: str, claim: Object) -> Iterator[Cause]:
    """A claim without a volume; one that waits for its first pod is no obstacle."""
    events = [one for one in scene.by_name.get(name, []) if one.get("involvedObject", {}).get("kind") != "Pod"]
    if events and events[-1].get("reason") in ("WaitForFirstConsumer", "WaitForPodScheduled"):
        return
    spec = claim.get("spec") or {}
    chosen, size = spec.get("storageClassName"), ((spec.get("resources") or {}).get("requests") or {}).get("storage")
    classes = {one["metadata"]["name"]: one for one in scene.snapshot.of("StorageClass")}
    if (classes.get(chosen or "") or {}).get("volumeBindingMode") == "WaitForFirstConsumer" and not events:
        return
    proof = [of_object({**claim, "kind": "PersistentVolumeClaim"}, "status.phase", "Pending")]
    trouble = [one for one in events if one.get("reason") in ("ProvisioningFailed", "FailedBinding")]
    proof += [of_event(trouble[-1])] if trouble else []
    words = str(trouble[-1].get("message")) if trouble else ""
    if chosen and (f'"{chosen}" not found' in words or (classes and chosen not in classes)):
        said = f"claim {name} has no volume: there is no storage class {chosen}"
        way_out = f"a claim of a class that there is ({', '.join(sorted(classes)) or 'kubectl get storageclass'})"
    else:
        said = f"claim {name} has no volume: {shown(words) or f'nothing of class {chosen} and {size} was found for it'}"
        way_out = "another claim in cluster.volumes, a class that provides volumes, or a free volume of that size"
    yield Cause("claim-unbound", said, way_out, Stage.volumes, tuple(proof))


def _mounts(scene: Scene, pod: Object) -> Iterator[Cause]:
    """What the node last said of a pod whose containers have not begun since."""
    since = max(begun(pod), seconds(pod["metadata"].get("creationTimestamp") or ""))
    said = [one for one in scene.events_of(pod, *MOUNTS) if one.get("type") == "Warning" and when(one) >= since]
    texts = [(str(one.get("message") or ""), of_event(one)) for one in reversed(said) if _is_mount(one)]
    for one in (*statuses(pod, "initContainerStatuses"), *statuses(pod)):
        waits = (one.get("state") or {}).get("waiting") or {}
        if waits.get("reason") in ("CreateContainerConfigError", "CreateContainerError"):
            field = f"status.containerStatuses[{one['name']}].state.waiting"
            text = str(waits.get("message") or "")
            texts.insert(0, (text, of_object(pod, field, f"{waits['reason']}: {text}")))
    for text, proof in texts[:1]:
        yield _of_text(scene, pod, text, proof)


def _is_mount(event: Object) -> bool:
    """A node says `Failed` of images as well."""
    text = str(event.get("message"))
    return event.get("reason") != "Failed" or bool(MISSING.search(text) or NO_KEY.search(text))


def _of_text(scene: Scene, pod: Object, text: str, proof: Evidence) -> Cause:
    missing, key, whom = MISSING.search(text), NO_KEY.search(text), (pod["metadata"]["name"],)
    if missing:
        return _missing(scene, pod, missing["kind"], missing["name"], proof)
    if key:
        return _no_key(pod, key, text, proof)
    if "Multi-Attach" in text or "already used by pod" in text:
        said = f"a volume is held by another node: {shown(text)}"
        way_out = "wait until the other pod is gone, or a claim that allows ReadWriteMany"
        return Cause("volume-busy", said, way_out, Stage.volumes, (proof,), passes=True, whom=whom)
    if "sandbox" in text:
        said = f"the node cannot set up the network of its pods: {shown(text)}"
        way_out = "let the operator of the cluster look at the node's network plugin"
        return Cause("sandbox", said, way_out, Stage.volumes, (proof,), passes=True, whom=whom)
    if "runAsNonRoot" in text or "will run as root" in text:
        said = f"the image runs as root, and the pod must not: {shown(text)}"
        return Cause(
            "image-as-root", said, "an image with a user of its own (USER 1000)", Stage.start, (proof,), whom=whom
        )
    said = f"a volume cannot be mounted: {shown(text)}"
    return Cause("mount-failed", said, "look at the claim and its storage", Stage.volumes, (proof,), whom=whom)


def _missing(scene: Scene, pod: Object, kind: str, name: str, proof: Evidence | None) -> Cause:
    title, named, key = KINDS[kind]
    space = scene.snapshot.namespace
    there = sorted(one["metadata"]["name"] for one in scene.snapshot.of(named))
    evidence = [proof] if proof else []
    if kind != "configmap" and not scene.snapshot.unread(named):
        evidence.append(Evidence(f"{named}s of {space}", "metadata.name", ", ".join(there) or "none"))
    word = {"secret": "secret", "configmap": "config map", "persistentvolumeclaim": "claim"}[kind]
    way_out = f"create it, or name another one ({key})"
    if kind == "configmap":
        way_out = f"orchestrator rm {scene.name}, then submit it again: it came without what it needs"
    said = f"namespace {space} has no {word} {name}, which its pods mount"
    return Cause(title, said, way_out, Stage.volumes, tuple(evidence), whom=(pod["metadata"]["name"],))


def _no_key(pod: Object, found: re.Match[str], text: str, proof: Evidence) -> Cause:
    """The object is there without the key that the run names."""
    key, is_secret = found["key"] or found["key2"], (found["what"] or found["what2"] or "").lower() == "secret"
    volume = VOLUME.search(text)
    name = found["name"] or _source_of(pod, volume["volume"] if volume else "", is_secret)
    word, title = ("secret", "secret-missing") if is_secret else ("config map", "config-map-missing")
    said = f"{word} {name} has no key {key}"
    way_out = f"add the key, or name another one ({KINDS['secret'][2]})" if is_secret else "submit the run again"
    return Cause(title, said, way_out, Stage.volumes, (proof,), whom=(pod["metadata"]["name"],))


def _source_of(pod: Object, volume: str, is_secret: bool) -> str:
    for one in pod["spec"].get("volumes") or []:
        if one["name"] == volume:
            source = (one.get("secret") or {}).get("secretName"), (one.get("configMap") or {}).get("name")
            return str(source[0] if is_secret else source[1])
    return "?"
