"""What a run will ask of a cluster, read from the very objects that would be sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from orchestrator.cluster.forecast.amounts import ZERO, amount, amounts, total

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """Pods that are alike."""

    role: str
    count: int
    spec: Object
    labels: Mapping[str, str]
    requests: Mapping[str, Decimal]
    """What the scheduler counts of one pod."""
    limits: Mapping[str, Decimal]


@dataclass(frozen=True, slots=True)
class Share:
    """How the keys of a config become what a pod asks for."""

    processes: int = 1
    """Of one node of the run."""
    shm_bytes: int = 0
    """Counted in the memory."""

    def key(self, resource: str, amount: Decimal) -> str:
        """The setting with which a pod asks for no more than `amount`."""
        if resource == "cpu":
            return f"cluster.cpus_per_process={_rounded(amount / self.processes, 1)}"
        each = (amount - self.shm_bytes) / self.processes / (1 << 30)
        return f"cluster.memory_gib_per_process={_rounded(each, 1)}"


def _rounded(value: Decimal, digits: int) -> str:
    """Down, without a needless nought."""
    scale = 10**digits
    return f"{int(value * scale) / scale:g}"


def groups_of(objects: Iterable[Object]) -> list[Group]:
    """The groups of pods that rendered objects make."""
    makers = {"Job": _of_job, "JobSet": _of_jobset, "TrainingRuntime": _of_runtime, "RayJob": _of_rayjob}
    return [group for obj in objects if obj["kind"] in makers for group in makers[obj["kind"]](obj["spec"])]


def run_of(objects: Sequence[Object]) -> Object:
    """The run itself is the last object."""
    return objects[-1]


def _of_job(spec: Object) -> list[Group]:
    return [_group("node", int(spec.get("completions") or 1), spec["template"])]


def _of_jobset(spec: Object) -> list[Group]:
    groups = []
    for job in spec["replicatedJobs"]:
        inner = job["template"]["spec"]
        count = int(job.get("replicas") or 1) * int(inner.get("completions") or inner.get("parallelism") or 1)
        groups.append(_group(job["name"], count, inner["template"]))
    return groups


def _of_runtime(spec: Object) -> list[Group]:
    """Trainer gives each replicated Job as many pods as the policy says nodes."""
    nodes = int((spec.get("mlPolicy") or {}).get("numNodes") or 1)
    return [
        _group(job["name"], nodes, job["template"]["spec"]["template"])
        for job in spec["template"]["spec"]["replicatedJobs"]
    ]


def _of_rayjob(spec: Object) -> list[Group]:
    cluster = spec["rayClusterSpec"]
    head = [_group("head", 1, cluster["headGroupSpec"]["template"])]
    workers = [
        _group(one["groupName"], int(one.get("replicas") or 0), one["template"])
        for one in cluster.get("workerGroupSpecs") or []
    ]
    submitter = spec.get("submitterPodTemplate")
    return [*head, *workers, *([_group("submitter", 1, submitter)] if submitter else [])]


def _group(role: str, count: int, template: Object) -> Group:
    spec = template["spec"]
    labels = (template.get("metadata") or {}).get("labels") or {}
    return Group(role, count, spec, labels, requests_of(spec), pod_amounts(spec, "limits"))


def requests_of(spec: Object) -> dict[str, Decimal]:
    """What the scheduler counts of a pod: a limit stands for a request that is not given, and the pod itself is one."""
    return {**pod_amounts(spec, "requests"), "pods": amount(1)}


def pod_amounts(spec: Object, which: str) -> dict[str, Decimal]:
    """The containers together, or the greatest init container where that asks for more, and the overhead."""
    own = total(container_amounts(one, which) for one in spec["containers"])
    for init in spec.get("initContainers") or []:
        for name, value in container_amounts(init, which).items():
            own[name] = max(own.get(name, ZERO), value)
    return total([own, amounts(spec.get("overhead"))])


def container_amounts(container: Object, which: str) -> dict[str, Decimal]:
    resources = container.get("resources") or {}
    limits = amounts(resources.get("limits"))
    return limits if which == "limits" else {**limits, **amounts(resources.get("requests"))}
