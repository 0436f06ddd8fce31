"""The layer of what the run refers to: claims and their storage, secrets, config maps, accounts, priorities, image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.cluster.forecast.answer import Finding, Object, Surroundings, Verdict, named
from orchestrator.cluster.forecast.demand import Group
from orchestrator.errors import nearest

LAYER = "presence"
KEYS = {"PersistentVolumeClaim": "cluster.volumes", "Secret": "tracking.secret or cluster.store_secret",
        "ServiceAccount": "cluster.service_account", "PriorityClass": "cluster.priority"}  # fmt: skip
PROVISIONS_NOTHING = "kubernetes.io/no-provisioner"


def judge_presence(objects: Sequence[Object], groups: Sequence[Group], around: Surroundings) -> list[Finding]:
    """One finding for each thing that is missing or could not be looked at; one that says that all is there."""
    wanted = sorted({pair for group in groups for pair in _references(group.spec)})
    brought = {(obj["kind"], obj["metadata"]["name"]) for obj in objects}
    findings = [_look(kind, name, around) for kind, name in wanted if (kind, name) not in brought]
    told = [finding for finding in findings if finding.verdict is not Verdict.fits]
    there = [Finding(LAYER, Verdict.fits, f"everything that it refers to is there ({len(findings)})")]
    return [*(told or there), *_image(groups, around)]


def _references(spec: Object) -> Iterator[tuple[str, str]]:
    """(kind, name) of all that a pod cannot start without."""
    for volume in spec.get("volumes") or []:
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
        if "secret" in volume and not volume["secret"].get("optional"):
            yield "Secret", volume["secret"]["secretName"]
        if "configMap" in volume and not volume["configMap"].get("optional"):
            yield "ConfigMap", volume["configMap"]["name"]
    for pull in spec.get("imagePullSecrets") or []:
        yield "Secret", pull["name"]
    if spec.get("serviceAccountName"):
        yield "ServiceAccount", spec["serviceAccountName"]
    if spec.get("priorityClassName"):
        yield "PriorityClass", spec["priorityClassName"]


def _look(kind: str, name: str, around: Surroundings) -> Finding:
    reason = around.unread(kind)
    if reason:
        return Finding(LAYER, Verdict.unchecked, f"{kind} {name}: not checked: {reason}")
    found = named(around.of(kind), name)
    if found is None:
        names = [one["metadata"]["name"] for one in around.of(kind)]
        hint = f" ({nearest(name, names)})" if names else ""
        way_out = f"create it, or another {KEYS.get(kind, 'name')}{hint}"
        return Finding(LAYER, Verdict.never, f"{kind} {name} is not there", way_out)
    if kind == "PersistentVolumeClaim":
        return _claim(found, around)
    return Finding(LAYER, Verdict.fits, f"{kind} {name} is there")


def _claim(claim: Object, around: Surroundings) -> Finding:
    """A claim is bound, or a class will make its volume, at once or when the first pod comes."""
    name, phase = claim["metadata"]["name"], (claim.get("status") or {}).get("phase")
    if phase == "Bound":
        return Finding(LAYER, Verdict.fits, f"claim {name} is bound")
    if phase == "Lost":
        return Finding(LAYER, Verdict.never, f"claim {name} has lost its volume", "another claim in cluster.volumes")
    wanted = (claim.get("spec") or {}).get("storageClassName")
    if around.unread("StorageClass"):
        said = f"claim {name} is {phase}; its class was not checked: {around.unread('StorageClass')}"
        return Finding(LAYER, Verdict.unchecked, said)
    classes = around.of("StorageClass")
    found = named(classes, wanted) if wanted else None
    if wanted and found is None:
        has = ", ".join(one["metadata"]["name"] for one in classes) or "none"
        said = f"claim {name} is {phase}: there is no StorageClass {wanted} (the cluster has {has})"
        return Finding(LAYER, Verdict.never, said, "a claim of another class")
    if found and found.get("volumeBindingMode") == "WaitForFirstConsumer":
        return Finding(LAYER, Verdict.fits, f"claim {name} is bound when its first pod comes")
    if found is None or found.get("provisioner") == PROVISIONS_NOTHING:
        return Finding(LAYER, Verdict.waits, f"claim {name} is {phase}: nothing makes a volume for it")
    return Finding(LAYER, Verdict.waits, f"claim {name} is {phase}: {found['provisioner']} is to make its volume")


def _image(groups: Sequence[Group], around: Surroundings) -> list[Finding]:
    """Nobody can ask a registry for a node; but a node tells which images it has."""
    if around.unread("Node"):
        return []
    images = {one["image"] for group in groups for one in group.spec["containers"] if one.get("image")}
    have = [name for node in around.of("Node") for one in (node.get("status") or {}).get("images") or []
            for name in one.get("names") or []]  # fmt: skip
    unknown = sorted(image for image in images if not any(_same(image, name) for name in have))
    said = "is on no node yet; whether it can be pulled shows only there"
    return [Finding("image", Verdict.unchecked, f"{image} {said}") for image in unknown]


def _same(image: str, name: str) -> bool:
    digest = image.rpartition("@")[2]
    return name == image or ("@" in image and name.endswith(digest))
