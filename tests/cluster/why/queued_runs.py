"""One change to a healthy cluster each, and the cause that must come first: a run that Kueue does not let in."""

from __future__ import annotations

from scenes import GPU, SPACE, World, condition, queued, workload

NO_FLAVOR = "couldn't assign flavors to pod set main:"


def queue_full(world: World) -> None:
    queued(
        world,
        f"couldn't assign flavors to pod set main: insufficient unused quota for {GPU} in flavor a100, 12 more needed",
    )
    world.add("Workload", workload("big-11111111", holds=12, at="2026-01-01T08:00:00Z"))
    world.add("Workload", workload("first-22222222", at="2026-01-01T09:00:00Z", conditions=[]))
    world.add("Workload", workload("later-33333333", at="2026-01-01T10:05:00Z", conditions=[]))


def queue_waits_its_turn(world: World) -> None:
    queued(world, "")
    world.add("Workload", workload("first-22222222", at="2026-01-01T09:00:00Z", conditions=[]))


def queue_too_small(world: World) -> None:
    queued(world, f"{NO_FLAVOR} insufficient quota for {GPU} in flavor a100, request > maximum capacity (32 > 16)")


def one_flavor_too_small(world: World) -> None:
    """The other flavor is only full, so waiting helps."""
    never = f"insufficient quota for {GPU} in flavor t4, request > maximum capacity (16 > 4)"
    queued(world, f"{NO_FLAVOR} {never}, insufficient unused quota for {GPU} in flavor a100, 8 more needed")


def queue_missing(world: World) -> None:
    queued(world, "LocalQueue gpu doesn't exist", reason="Inadmissible")


def queue_inactive(world: World) -> None:
    queued(world, "ClusterQueue team is inactive", reason="Inadmissible")
    text = "Can't admit new workloads: is stopped."
    world.objects["ClusterQueue"][0]["status"]["conditions"] = [condition("Active", "False", "Stopped", text)]
    world.objects["ClusterQueue"][0]["spec"]["stopPolicy"] = "Hold"


def queue_closed(world: World) -> None:
    queued(world, "Workload namespace doesn't match ClusterQueue selector")


def queue_ignores(world: World) -> None:
    queued(world, "")
    world.objects["Workload"] = []


def preempted_in_the_queue(world: World) -> None:
    by = workload("urgent-44444444", priority=1000, holds=16)
    why = (
        f"Preempted to accommodate a workload (UID: {by['metadata']['uid']}) due to prioritization in the ClusterQueue"
    )
    text = (
        f"couldn't assign flavors to pod set main: insufficient unused quota for {GPU} in flavor a100, 16 more needed"
    )
    queued(
        world,
        text,
        condition("Evicted", "True", "Preempted", why),
        condition("Preempted", "True", "InClusterQueue", why),
    )
    world.add("Workload", by)


def being_preempted(world: World) -> None:
    """Its pods still run, and save."""
    by = workload("urgent-44444444", priority=1000)
    why = (
        f"Preempted to accommodate a workload (UID: {by['metadata']['uid']}) due to prioritization in the ClusterQueue"
    )
    pods, status = world.pods, world.run["status"]
    own = queued(world, "")
    own["status"]["conditions"] = [
        condition("QuotaReserved", "True", "QuotaReserved"),
        condition("Admitted", "True", "Admitted"),
        condition("Evicted", "True", "Preempted", why),
        condition("Preempted", "True", "InClusterQueue", why),
    ]
    world.objects["Pod"] += pods
    world.run["status"], world.run["spec"]["suspend"] = status, False
    world.add("Workload", by)


def admission_check(world: World) -> None:
    own = queued(world, "")
    reserved = condition("QuotaReserved", "True", "QuotaReserved", "Quota reserved in ClusterQueue team")
    own["status"] = {
        "conditions": [
            reserved,
            condition("Admitted", "False", "NoChecks"),
            condition("Evicted", "False", "QuotaReserved", "Previously: Preempted to accommodate a workload (UID: 1)"),
        ],
        "admissionChecks": [
            {"name": "capacity", "state": "Pending", "message": "the cloud has no a100 in this zone now"}
        ],
    }


CASES = (
    (queue_full, "queue-full", ("big-11111111 (12 GPU)", "1 before it: first-22222222", "12 of 16 GPU taken")),
    (queue_waits_its_turn, "queue-full", ("1 before it: first-22222222",)),
    (queue_too_small, "queue-too-small", ("asks for 32 GPU", "at most 16")),
    (one_flavor_too_small, "queue-full", ("8 GPU more needed",)),
    (queue_missing, "queue-missing", ("LocalQueue gpu",)),
    (queue_inactive, "queue-stopped", ("is stopped",)),
    (queue_closed, "queue-closed", ("team", SPACE)),
    (queue_ignores, "queue-ignores-it", ("gpus", "Job")),
    (preempted_in_the_queue, "preempted", ("by urgent-44444444", "priority 1000 over 0")),
    (being_preempted, "preempted", ("by urgent-44444444",)),
    (admission_check, "admission-check", ("no a100 in this zone",)),
)  # fmt: skip
