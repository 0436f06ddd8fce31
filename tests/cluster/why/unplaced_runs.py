"""One change to a healthy cluster each, and the cause that must come first: pods that no node takes."""

from __future__ import annotations

from scenes import GPU, World, node, pending, pod

NOT_HELPFUL = "preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling."
NO_VICTIMS = "preemption: 0/2 nodes are available: 2 No preemption victims found for incoming pod."
LACKS_GPU = f"0/2 nodes are available: 2 Insufficient {GPU}. {NO_VICTIMS}"


def nodes_in_use(world: World) -> None:
    for one in world.pods:
        pending(one, LACKS_GPU)
    for name in ("node-a", "node-b"):
        other = pod(0, name, suffix=name)
        other["metadata"] |= {"name": f"other-{name}", "uid": name, "ownerReferences": []}
        other["metadata"]["labels"] = {"orchestrator/run": "other-99999999"}
        world.add("Pod", other)


def nodes_too_small(world: World) -> None:
    for one in world.pods:
        one["spec"]["containers"][0]["resources"]["requests"][GPU] = "16"
        pending(one, f"0/2 nodes are available: 2 Insufficient {GPU}. {NOT_HELPFUL}")


def nodes_not_readable_and_in_use(world: World) -> None:
    nodes_in_use(world)
    world.missing["Node"] = "no right to list nodes"


def nodes_not_readable_and_too_small(world: World) -> None:
    nodes_too_small(world)
    world.missing["Node"] = "no right to list nodes"


def nodes_tainted(world: World) -> None:
    for one in world.objects["Node"]:
        one["spec"]["taints"] = [{"key": GPU, "value": "present", "effect": "NoSchedule"}]
    for one in world.pods:
        pending(one, f"0/2 nodes are available: 2 node(s) had untolerated taint(s). {NOT_HELPFUL}")


def nodes_tainted_and_not_readable(world: World) -> None:
    nodes_tainted(world)
    world.missing["Node"] = "no right to list nodes"


def tainted_beside_full_ones(world: World) -> None:
    """20 empty nodes have a taint, two that would do are full: the taint keeps more away."""
    nodes_in_use(world)
    for number in range(20):
        world.add("Node", node(f"fake-{number}", taints=[{"key": "pool", "value": "a100", "effect": "NoSchedule"}]))
    text = (
        f"0/22 nodes are available: 2 Insufficient {GPU}, 20 node(s) had untolerated taint(s). preemption: 0/22 nodes "
    )
    text += (
        "are available: 2 No preemption victims found for incoming pod, 20 Preemption is not helpful for scheduling."
    )
    for one in world.pods:
        pending(one, text)


def full_beside_small_tainted_ones(world: World) -> None:
    """Three control planes without GPUs have a taint: tolerating it would not help."""
    nodes_in_use(world)
    for number in range(3):
        taint = {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}
        world.add("Node", node(f"control-{number}", gpus=0, taints=[taint]))
    for one in world.pods:
        pending(one, f"0/5 nodes are available: 2 Insufficient {GPU}, 3 node(s) had untolerated taint(s). {NO_VICTIMS}")


def full_beside_small_tainted_pool(world: World) -> None:
    """Tolerating the taint of a pool without GPUs would not help either."""
    nodes_in_use(world)
    for number in range(3):
        taint = {"key": "pool", "value": "cpu", "effect": "NoSchedule"}
        world.add("Node", node(f"cpu-{number}", gpus=0, taints=[taint]))


def full_beside_control_planes(world: World) -> None:
    """A run on CPUs would find room on control planes, which are not meant for it."""
    for one in world.pods:
        one["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "20"}}
        pending(one, f"0/5 nodes are available: 2 Insufficient cpu, 3 node(s) had untolerated taint(s). {NO_VICTIMS}")
    for name in ("node-a", "node-b"):
        other = pod(0, name, suffix=name)
        other["metadata"] |= {"name": f"other-{name}", "uid": name, "ownerReferences": []}
        other["metadata"]["labels"] = {"orchestrator/run": "other-99999999"}
        other["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "30"}}
        world.add("Pod", other)
    for number in range(3):
        taint = {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}
        world.add("Node", node(f"control-{number}", taints=[taint]))


def wrong_label(world: World) -> None:
    for one in world.pods:
        one["spec"]["nodeSelector"] = {"pool": "h100"}
        text = f"0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector. {NOT_HELPFUL}"
        pending(one, text)


def wrong_affinity(world: World) -> None:
    rule = {"matchExpressions": [{"key": "pool", "operator": "In", "values": ["h100"]}]}
    for one in world.pods:
        one["spec"]["affinity"] = {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [rule]}}
        }
        pending(one, f"0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector. {NOT_HELPFUL}")


def cordoned(world: World) -> None:
    for one in world.objects["Node"]:
        one["spec"]["unschedulable"] = True
        one["spec"]["taints"] = [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]
    for one in world.pods:
        pending(one, f"0/2 nodes are available: 2 node(s) were unschedulable. {NOT_HELPFUL}")


def gated(world: World) -> None:
    for one in world.pods:
        one["spec"]["schedulingGates"] = [{"name": "example.com/wait"}]
        pending(one, "Scheduling is blocked due to non-empty scheduling gates", "SchedulingGated")


CASES = (
    (nodes_in_use, "resources-in-use", ("other-99999999 (16)", "2 nodes would do")),
    (nodes_too_small, "resources-too-small", ("16 GPU", "largest of 2 nodes has 8", "Node node-")),
    (nodes_not_readable_and_in_use, "resources-in-use", ("no node has 8 GPU free",)),
    (nodes_not_readable_and_too_small, "resources-too-small", ("16 GPU",)),
    (nodes_tainted, "taints", (f"{GPU}=present:NoSchedule", "cluster.tolerations")),
    (nodes_tainted_and_not_readable, "taints", ("2 nodes have a taint",)),
    (tainted_beside_full_ones, "taints", ("20 nodes", "pool=a100:NoSchedule")),
    (full_beside_small_tainted_ones, "resources-in-use", ("other-99999999",)),
    (full_beside_small_tainted_pool, "resources-in-use", ("other-99999999",)),
    (full_beside_control_planes, "resources-in-use", ("20 cpu", "other-99999999 (60)")),
    (wrong_label, "affinity", ("pool=h100", "pool: a100")),
    (wrong_affinity, "affinity", ("2 nodes",)),
    (cordoned, "nodes-cordoned", ("2 nodes",)),
    (gated, "scheduling-gates", ("example.com/wait",)),
)  # fmt: skip
