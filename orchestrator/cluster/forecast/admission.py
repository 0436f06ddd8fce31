"""The layers of the server itself: Pod Security and the rights of whoever submits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.cluster.forecast.answer import Finding, Object, Surroundings, Verdict, named, unchecked
from orchestrator.cluster.forecast.demand import Group
from orchestrator.cluster.kubernetes.resources import SENT

SECURITY, RIGHTS = "pod security", "rights"
ENFORCE = "pod-security.kubernetes.io/enforce"
HARMLESS = {
    "restricted": {"NET_BIND_SERVICE"},
    "baseline": {"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE",
                 "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"},
}  # fmt: skip
"""Capabilities that a level lets a container add (Pod Security Standards of Kubernetes 1.37)."""


def judge_security(groups: Sequence[Group], around: Surroundings) -> Finding:
    """What the namespace's level forbids of these pods; they meet `restricted` but for what a config adds."""
    missing = unchecked(SECURITY, around, "Namespace")
    if missing:
        return missing
    space = named(around.of("Namespace"), around.namespace)
    if space is None:
        said = f"namespace {around.namespace} is not there"
        return Finding(SECURITY, Verdict.never, said, "create it, or another cluster.namespace")
    level = (space["metadata"].get("labels") or {}).get(ENFORCE, "privileged")
    broken = sorted({text for group in groups for text in _broken(group.spec, level)})
    if broken:
        said = f"namespace {around.namespace} enforces {level}: {'; '.join(broken)}"
        return Finding(SECURITY, Verdict.never, said, "cluster.rdma=null, or a namespace of another level")
    return Finding(SECURITY, Verdict.fits, f"the pods meet `{level}`")


def _broken(spec: Object, level: str) -> Iterator[str]:
    if level not in HARMLESS:
        return
    for container in [*spec["containers"], *(spec.get("initContainers") or [])]:
        security = container.get("securityContext") or {}
        added = set((security.get("capabilities") or {}).get("add") or []) - HARMLESS[level]
        if added:
            yield f"container {container['name']} adds {', '.join(sorted(added))}"
        if security.get("privileged"):
            yield f"container {container['name']} is privileged"
    for volume in spec.get("volumes") or []:
        if "hostPath" in volume:
            yield f"volume {volume['name']} is of the host"
    if spec.get("hostNetwork"):
        yield "the pod uses the host's network"


def judge_rights(objects: Sequence[Object], around: Surroundings) -> Finding:
    """Whether every object may be created by whoever took the snapshot."""
    missing = unchecked(RIGHTS, around, "SelfSubjectRulesReview")
    if missing:
        return missing
    rules = [rule for one in around.of("SelfSubjectRulesReview") for rule in one["status"].get("resourceRules") or []]
    kinds = sorted({obj["kind"] for obj in objects})
    lacking = [kind for kind in kinds if not any(_allows(rule, kind) for rule in rules)]
    if lacking:
        plurals = ", ".join(SENT[kind].plural for kind in lacking)
        said = f"no right to create {plurals} in namespace {around.namespace}"
        return Finding(RIGHTS, Verdict.never, said, "whoever runs the cluster binds you to k8s/base's submitter role")
    return Finding(RIGHTS, Verdict.fits, f"all {len(kinds)} kinds of objects may be created")


def _allows(rule: Object, kind: str) -> bool:
    resource = SENT[kind]
    groups, resources, verbs = rule.get("apiGroups") or [], rule.get("resources") or [], rule.get("verbs") or []
    return (
        bool({"*", resource.group} & set(groups))
        and bool({"*", resource.plural} & set(resources))
        and bool({"*", "create"} & set(verbs))
        and not rule.get("resourceNames")
    )
