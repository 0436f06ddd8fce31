"""The layers of a namespace: ResourceQuota and LimitRange."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal

from orchestrator.cluster.forecast.amounts import ZERO, Amounts, amount, amounts, times, told, total
from orchestrator.cluster.forecast.answer import Finding, Object, Surroundings, Verdict, unchecked
from orchestrator.cluster.forecast.demand import Group, container_amounts
from orchestrator.cluster.kubernetes.resources import SENT

QUOTA, LIMITS = "quota", "limit range"
COMPUTE = ("cpu", "memory", "ephemeral-storage")
COUNTED = {"configmaps": "ConfigMap", "services": "Service"}
"""Kinds that a quota may also count by their bare name."""


def judge_quotas(objects: Sequence[Object], groups: Sequence[Group], around: Surroundings) -> Finding:
    """What all pods and objects together take of each quota of the namespace."""
    missing = unchecked(QUOTA, around, "ResourceQuota")
    if missing:
        return missing
    quotas = around.of("ResourceQuota")
    findings = [found for one in quotas for found in _judge(one, objects, groups)]
    if findings:
        return max(findings, key=lambda finding: finding.verdict)
    names = ", ".join(one["metadata"]["name"] for one in quotas)
    return Finding(QUOTA, Verdict.fits, f"within {names}" if names else "the namespace has none")


def _judge(quota: Object, objects: Sequence[Object], groups: Sequence[Group]) -> Iterator[Finding]:
    counted = [group for group in groups if _in_scope(quota.get("spec") or {}, group)]
    scoped = bool((quota.get("spec") or {}).get("scopes") or (quota.get("spec") or {}).get("scopeSelector"))
    taken = _demand(counted, [] if scoped else objects)
    hard = amounts((quota.get("status") or {}).get("hard") or (quota.get("spec") or {}).get("hard"))
    used = amounts((quota.get("status") or {}).get("used"))
    name = quota["metadata"]["name"]
    for resource, most in hard.items():
        unsaid = [one.role for one in counted if _is_unsaid(resource, one)]
        if unsaid:
            said = f"{name} counts {resource}, and pods that name none are refused: {', '.join(unsaid)}"
            way_out = f"a LimitRange of the namespace that gives a default, or {name} without {resource}"
            yield Finding(QUOTA, Verdict.never, said, way_out)
        need = taken.get(resource, ZERO)
        if need <= most - used.get(resource, ZERO):
            continue
        kind = resource.removeprefix("requests.").removeprefix("limits.")
        said = f"{name}: needs {told(kind, need)} {resource}, {told(kind, used.get(resource, ZERO))} of "
        said += f"{told(kind, most)} are taken"
        if need > most:
            way_out = f"ask for at most {told(kind, most)} {resource}, or let {name} be raised"
            yield Finding(QUOTA, Verdict.never, said, way_out)
        else:
            yield Finding(QUOTA, Verdict.waits, said)


def _demand(groups: Sequence[Group], objects: Sequence[Object]) -> Amounts:
    """By the names that a quota gives them."""
    requests = total(times(group.requests, group.count) for group in groups)
    limits = total(times(group.limits, group.count) for group in groups)
    demand: dict[str, Decimal] = dict(requests)
    demand |= {f"requests.{name}": value for name, value in requests.items()}
    demand |= {f"limits.{name}": value for name, value in limits.items()}
    for obj in objects:
        resource = SENT[obj["kind"]]
        key = f"count/{resource.plural}" + (f".{resource.group}" if resource.group else "")
        bare = next((name for name, kind in COUNTED.items() if kind == obj["kind"]), key)
        for name in {key, bare}:
            demand[name] = demand.get(name, ZERO) + 1
    demand["count/pods"] = demand.get("pods", ZERO)
    return demand


def _is_unsaid(resource: str, group: Group) -> bool:
    """Whether a quota on limits meets a pod without one: the server refuses that pod."""
    which, _, name = resource.partition(".")
    if resource in COMPUTE:
        which, name = "requests", resource
    if which not in ("requests", "limits") or name not in COMPUTE[:2]:
        return False
    every = [*group.spec["containers"], *(group.spec.get("initContainers") or [])]
    return any(name not in container_amounts(one, which) for one in every)


def _in_scope(spec: Object, group: Group) -> bool:
    ends = group.spec.get("activeDeadlineSeconds") is not None
    answers = {"Terminating": ends, "NotTerminating": not ends, "BestEffort": False, "NotBestEffort": True}
    if not all(answers.get(scope, True) for scope in spec.get("scopes") or []):
        return False
    for rule in (spec.get("scopeSelector") or {}).get("matchExpressions") or []:
        if rule["scopeName"] == "PriorityClass":
            given = group.spec.get("priorityClassName")
            told_ones = rule.get("values") or []
            matches = {"In": given in told_ones, "NotIn": given not in told_ones, "Exists": given is not None}
            if not matches.get(rule["operator"], given is None):
                return False
        elif not answers.get(rule["scopeName"], True):
            return False
    return True


def judge_limits(groups: Sequence[Group], around: Surroundings) -> Finding:
    """Each container and each pod against what the namespace allows at least and at most."""
    missing = unchecked(LIMITS, around, "LimitRange")
    if missing:
        return missing
    ranges = around.of("LimitRange")
    for one in ranges:
        for item in (one.get("spec") or {}).get("limits") or []:
            for group in groups:
                broken = next(_broken(item, group), None)
                if broken:
                    said, way_out = broken
                    return Finding(LIMITS, Verdict.never, f"{one['metadata']['name']}: {said}", way_out)
    names = ", ".join(one["metadata"]["name"] for one in ranges)
    return Finding(LIMITS, Verdict.fits, f"within {names}" if names else "the namespace has none")


def _broken(item: Object, group: Group) -> Iterator[tuple[str, str]]:
    """What a rule of a LimitRange forbids, and the way out."""
    if item["type"] == "Pod":
        yield from _outside(item, f"a pod ({group.role})", group.requests, group.limits)
    elif item["type"] == "Container":
        for container in [*group.spec["containers"], *(group.spec.get("initContainers") or [])]:
            requests, limits = _defaulted(item, container)
            yield from _outside(item, f"container {container['name']}", requests, limits)
            yield from _crossed(container["name"], requests, limits)


def _defaulted(item: Object, container: Object) -> tuple[Amounts, Amounts]:
    """Requests and limits after the server has put in what the container does not say."""
    limits = {**amounts(item.get("default")), **container_amounts(container, "limits")}
    said = amounts((container.get("resources") or {}).get("requests"))
    return {**limits, **amounts(item.get("defaultRequest")), **said}, limits


def _crossed(name: str, requests: Amounts, limits: Amounts) -> Iterator[tuple[str, str]]:
    for key, value in requests.items():
        if key in limits and value > limits[key]:
            said = f"container {name} asks for {told(key, value)} {key}, above the default limit of "
            yield said + told(key, limits[key]), f"{_key_of(key)}, or let the default be raised"


def _outside(item: Object, what: str, requests: Amounts, limits: Amounts) -> Iterator[tuple[str, str]]:
    for key, most in amounts(item.get("max")).items():
        value = limits.get(key)
        if value is None:
            yield f"{what} needs a limit of {key} (at most {told(key, most)})", "a default in the same LimitRange"
        elif value > most:
            yield f"{what} has {told(key, value)} {key}, at most {told(key, most)} are allowed", _key_of(key)
    for key, least in amounts(item.get("min")).items():
        value = requests.get(key)
        if value is not None and value < least:
            yield f"{what} asks for {told(key, value)} {key}, at least {told(key, least)} are wanted", _key_of(key)
    for key, ratio in (item.get("maxLimitRequestRatio") or {}).items():
        if requests.get(key) and key in limits and limits[key] / requests[key] > amount(ratio):
            yield f"{what}: limit over request of {key} is above {ratio}", "a smaller default limit"


def _key_of(resource: str) -> str:
    keys = {"cpu": "cluster.cpus_per_process", "memory": "cluster.memory_gib_per_process",
            "ephemeral-storage": "cluster.disk_gib"}  # fmt: skip
    return f"another {keys.get(resource, 'compute.num_processes')}"
