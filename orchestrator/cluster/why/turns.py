"""Who has a place in one of Kueue's queues, who waits before a run, and how much the queue has. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.cluster.forecast.amounts import amount, short, told
from orchestrator.cluster.why.cause import Evidence
from orchestrator.cluster.why.scene import Object, Scene, is_true, of_object


def cluster_queue_name(scene: Scene, queue: str) -> str:
    local = scene.named("LocalQueue", queue) or {}
    return str((local.get("spec") or {}).get("clusterQueue") or "?")


def quota_of(scene: Scene, name: str, flavor: str, resource: str) -> list[Evidence]:
    """What the queue says of one resource: how much there is and how much is taken."""
    queue = scene.named("ClusterQueue", name)
    if queue is None:
        return []
    flavors = [one for group in queue["spec"].get("resourceGroups") or [] for one in group["flavors"]]
    nominal = _value(flavors, flavor, resource, "nominalQuota")
    used = _value((queue.get("status") or {}).get("flavorsReservation") or [], flavor, resource, "total")
    text = f"{told(resource, amount(used or 0))} of {told(resource, amount(nominal or 0))} {short(resource)} taken"
    return [of_object({**queue, "kind": "ClusterQueue"}, f"status.flavorsReservation[{flavor}]", text)]


def _value(flavors: Sequence[Object], flavor: str, resource: str, key: str) -> str | None:
    for one in flavors:
        if one["name"] == flavor:
            return next((part.get(key) for part in one.get("resources") or [] if part["name"] == resource), None)
    return None


def holders(scene: Scene, cluster_queue: str) -> list[Object]:
    """Runs that have a place in the queue, those that hold most first."""
    holding = [
        one for one in scene.snapshot.of("Workload")
        if is_true(one, "QuotaReserved") and not is_true(one, "Finished")
        and ((one.get("status") or {}).get("admission") or {}).get("clusterQueue") == cluster_queue
    ]  # fmt: skip
    return sorted(holding, key=lambda one: -float(_held_amount(one)[1] or 0))


def _held_amount(workload: Object) -> tuple[str, float]:
    """The scarcest resource that a run holds: GPUs where it has any."""
    sums: dict[str, float] = {}
    for part in ((workload.get("status") or {}).get("admission") or {}).get("podSetAssignments") or []:
        for name, value in (part.get("resourceUsage") or {}).items():
            sums[name] = sums.get(name, 0.0) + float(amount(value))
    best = next((name for name in sums if name.endswith("/gpu")), "cpu")
    return best, sums.get(best, 0.0)


def holding(workload: Object) -> str:
    name, value = _held_amount(workload)
    return f"{owner_of(workload)} ({told(name, amount(value))} {short(name)})" if value else owner_of(workload)


def ahead(scene: Scene, workload: Object, cluster_queue: str) -> list[Object]:
    """Runs that wait in the same queue and come first: by priority, then by age."""
    locals_ = {
        (one["metadata"].get("namespace"), one["metadata"]["name"])
        for one in scene.snapshot.of("LocalQueue")
        if (one.get("spec") or {}).get("clusterQueue") == cluster_queue
    }
    waiting = [
        one for one in scene.snapshot.of("Workload")
        if (one["metadata"].get("namespace"), (one.get("spec") or {}).get("queueName")) in locals_
        and not is_true(one, "QuotaReserved") and not is_true(one, "Finished")
        and (one.get("spec") or {}).get("active", True) and one["metadata"]["name"] != workload["metadata"]["name"]
    ]  # fmt: skip
    return sorted((one for one in waiting if _order(one) < _order(workload)), key=_order)


def _order(workload: Object) -> tuple[int, str]:
    return -priority(workload), str(workload["metadata"].get("creationTimestamp") or "")


def priority(workload: Object) -> int:
    return int((workload.get("spec") or {}).get("priority") or 0)


def owner_of(workload: Object | None) -> str:
    """The name of the run that a workload stands for."""
    if workload is None:
        return "?"
    owners = workload["metadata"].get("ownerReferences") or []
    return str(owners[0]["name"]) if owners else str(workload["metadata"]["name"])
