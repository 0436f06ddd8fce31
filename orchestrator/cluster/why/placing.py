"""Pods that no node takes: by the scheduler's words, and by the nodes themselves where they may be read. Pure.

The scheduler says how many nodes fail each rule, but names neither the taint nor what is short by how much, and not
which rule alone keeps the run away. That is worked out here: a rule counts by the nodes that it alone rules out.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal

from orchestrator.cluster.forecast.amounts import amounts, short, told
from orchestrator.cluster.forecast.demand import Group, pod_amounts, requests_of
from orchestrator.cluster.forecast.nodes import Node, barred, read_nodes, shortest
from orchestrator.cluster.why.cause import Cause, Depth, Evidence, Stage, shown
from orchestrator.cluster.why.scene import Object, Scene, condition, of_condition, of_object

COUNTED = re.compile(
    r"(?P<count>\d+) (?P<reason>(?:Insufficient \S+?|Too many pods|node\(s\) [^,]+?))(?=, \d|\. |\.$|$)"
)
HOPELESS = re.compile(r"(?P<count>\d+) Preemption is not helpful for scheduling")
MANY = 1e6
VOLUMES = ("persistentvolumeclaim", "PersistentVolumeClaims", "PersistentVolume", "volume zone", "free storage")
"""In what the scheduler says of claims, which is the business of `volumes`."""
RULES = {
    "untolerated taint": "taints",
    "didn't match Pod's node affinity/selector": "affinity",
    "were unschedulable": "nodes-cordoned",
    "topology spread": "spread",
    "pod affinity": "spread",
    "anti-affinity": "spread",
    "free ports": "ports",
}


@dataclass(slots=True)
class Barrier:
    """A rule that keeps a pod off nodes."""

    name: str
    what: str
    """The taint, the label, the resource."""
    count: int = 0
    """Nodes that it rules out."""
    only: list[str] = field(default_factory=list)
    """Those that nothing else rules out."""
    nodes: list[str] = field(default_factory=list)
    """All of them, where they are known."""
    passes: bool = False


def causes(scene: Scene) -> Iterator[Cause]:
    groups: dict[str, list[Object]] = defaultdict(list)
    for pod in scene.active:
        found = condition(pod, "PodScheduled")
        if found and found["status"] == "False":
            groups[f"{found.get('reason')} {found.get('message')}"].append(pod)
    for pods in groups.values():
        yield from _of_pods(scene, pods)


def _of_pods(scene: Scene, pods: list[Object]) -> Iterator[Cause]:
    """Pods of which the scheduler says the same."""
    pod = pods[0]
    found = condition(pod, "PodScheduled") or {}
    message, proof = str(found.get("message") or ""), of_condition(pod, found)
    whom = tuple(one["metadata"]["name"] for one in pods)
    at = str(found.get("lastTransitionTime") or "")
    if found.get("reason") == "SchedulingGated":
        gates = ", ".join(gate["name"] for gate in pod["spec"].get("schedulingGates") or [])
        said = f"its pods wait behind scheduling gates: {gates}"
        way_out = "look at the controller that set them"
        yield Cause("scheduling-gates", said, way_out, Stage.placing, (proof,), whom=whom, at=at, passes=True)
        return
    if any(word in message for word in VOLUMES):
        return
    # nodes that have room by now say nothing: the scheduler looked at them before
    barriers = _by_nodes(scene, pod) or _by_words(message)
    decisive = [barrier for barrier in barriers if barrier.only] or barriers
    bound = (event.get("reason") == "Scheduled" for event in scene.events)
    was_placed = any(bound) or any(one["spec"].get("nodeName") for one in scene.pods)
    full = was_placed and any(barrier.name == "resources-in-use" for barrier in decisive)
    for barrier in decisive:  # mending one that keeps no node away alone would not help
        depth = Depth.follows if full and not barrier.passes else Depth.root  # by the same rules it had a place before
        yield replace(_cause(scene, pod, barrier, (proof,)), depth=depth, whom=whom, at=at)
    if not barriers:
        said = f"no node takes its pods: {shown(message)}"
        yield Cause("unschedulable", said, "see what the scheduler says", Stage.placing, (proof,), whom=whom, at=at)


def _by_words(message: str) -> list[Barrier]:
    """By the scheduler's counts: of each node it tells the first rule that is broken, and all resources that lack."""
    rules, _, about_preemption = message.partition(" preemption: ")
    barriers = [_barrier(found["reason"], int(found["count"])) for found in COUNTED.finditer(rules)]
    hopeless = HOPELESS.search(about_preemption)
    others = sum(barrier.count for barrier in barriers if barrier.name != "resources-in-use")
    for barrier in barriers:
        # an empty node would do where the scheduler would look for pods to put out; elsewhere it says so
        if barrier.name == "resources-in-use" and hopeless and int(hopeless["count"]) - others >= barrier.count:
            barrier.name, barrier.passes = "resources-too-small", False
    return barriers


def _barrier(reason: str, count: int) -> Barrier:
    if reason.startswith("Insufficient"):
        return Barrier("resources-in-use", reason.split()[1], count, passes=True)
    if reason == "Too many pods":
        return Barrier("resources-in-use", "pods", count, passes=True)
    name = next((RULES[words] for words in RULES if words in reason), "unschedulable")
    return Barrier(name, reason, count, passes=name == "nodes-cordoned")


def _by_nodes(scene: Scene, pod: Object) -> list[Barrier]:
    """By what each node is, has and holds."""
    group = _group_of(pod)
    found: dict[tuple[str, str], Barrier] = {}
    nodes = read_nodes(scene.snapshot.of("Node"), scene.snapshot.of("Pod"))
    for node in [node for node in nodes if not _is_for_the_cluster(node)] or nodes:
        broken = list(_broken(group, node))
        for name, what, passes in broken:
            barrier = found.setdefault((name, what), Barrier(name, what, passes=passes))
            barrier.count += 1
            barrier.nodes.append(node.name)
            if len(broken) == 1:
                barrier.only.append(node.name)
    return list(found.values())


def _is_for_the_cluster(node: Node) -> bool:
    """A control plane, whose taint no run is meant to tolerate."""
    return any(taint["key"].startswith("node-role.kubernetes.io/") for taint in node.taints)


def _group_of(pod: Object) -> Group:
    spec = pod["spec"]
    labels = pod["metadata"].get("labels") or {}
    return Group("pod", 1, spec, labels, requests_of(spec), pod_amounts(spec, "limits"))


def _broken(group: Group, node: Node) -> Iterator[tuple[str, str, bool]]:
    """Each rule that a node breaks: its name, what it is about, whether it may pass by itself."""
    if node.ill:
        yield "nodes-cordoned", node.ill, True
    else:
        wide = _with(group, nodeSelector=None, affinity=None)
        taint = barred(wide, node)
        if taint:
            yield "taints", taint.removeprefix("have the taint "), False
    label = barred(_with(group, tolerations=[{"operator": "Exists"}]), node)
    if label:
        yield "affinity", label, False
    never = shortest(group.requests, node.room)
    if never:
        yield "resources-too-small", never, False
    else:
        now = shortest(group.requests, node.free)
        if now:
            yield "resources-in-use", now, True


def _with(group: Group, **changed: object) -> Group:
    return Group(group.role, 1, {**group.spec, **changed}, group.labels, group.requests, group.limits)


def _cause(scene: Scene, pod: Object, barrier: Barrier, proof: tuple[Evidence, ...]) -> Cause:
    makers = {
        "resources-too-small": _too_small,
        "resources-in-use": _in_use,
        "taints": _taints,
        "affinity": _affinity,
        "nodes-cordoned": _cordoned,
    }
    maker = makers.get(barrier.name)
    said, way_out, extra = maker(scene, pod, barrier) if maker else (f"no node takes its pods: {barrier.what}", "", [])
    return Cause(
        barrier.name,
        said,
        way_out or "another cluster.placement or cluster.tolerations, or more nodes",
        Stage.placing,
        (*proof, *extra),
        passes=barrier.passes,
        weight=len(barrier.only) + barrier.count / MANY,
    )


Told = tuple[str, str, list[Evidence]]
ASKED_BY = {
    "cpu": "cluster.cpus_per_process",
    "memory": "cluster.memory_gib_per_process",
    "ephemeral-storage": "cluster.disk_gib",
}
"""Resource -> the key that a run asks for it by."""


def _less(what: str) -> str:
    """How a pod asks for less of something."""
    nodes = "more compute.num_nodes for the same compute.num_processes"
    return f"a smaller {ASKED_BY[what]}, or {nodes}" if what in ASKED_BY else nodes


def _too_small(scene: Scene, pod: Object, barrier: Barrier) -> Told:
    """No node of those is large enough, were it empty."""
    asked, what = requests_of(pod["spec"]).get(barrier.what, Decimal(0)), short(barrier.what)
    sizes = {name: size for name, size in _sizes(scene, barrier.what).items() if name in barrier.nodes}
    if not sizes:
        said = f"a pod asks for {told(barrier.what, asked)} {what}, and no node has so much, were it empty"
        return said, f"less of it a pod: {_less(barrier.what)}", []
    best = max(sizes, key=lambda name: sizes[name])
    most = told(barrier.what, sizes[best])
    said = f"a pod asks for {told(barrier.what, asked)} {what}, and the largest of {len(sizes)} nodes has {most}"
    node = scene.named("Node", best) or {}
    proof = of_object({**node, "kind": "Node"}, f"status.allocatable[{barrier.what}]", most)
    way_out = f"at most {most} {what} a pod: {_less(barrier.what)}"
    if not sizes[best]:
        said = f"a pod asks for {told(barrier.what, asked)} {what}, and none of {len(sizes)} nodes has any"
        way_out = "nodes with it, or compute.device=cpu" if what == "GPU" else "nodes with it, or leave it out"
    return said, way_out, [proof]


def _sizes(scene: Scene, resource: str) -> Mapping[str, Decimal]:
    return {
        node["metadata"]["name"]: amounts((node.get("status") or {}).get("allocatable")).get(resource, Decimal(0))
        for node in scene.snapshot.of("Node")
    }


def _in_use(scene: Scene, pod: Object, barrier: Barrier) -> Told:
    asked = requests_of(pod["spec"]).get(barrier.what, Decimal(0))
    what = short(barrier.what)
    said = f"no node has {told(barrier.what, asked)} {what} free for a pod"
    held = _tenants(scene, barrier)
    if held:
        said += f": {len(barrier.only)} nodes would do, and their {what} is held by {_most(held, barrier.what)}"
    way_out = "wait, or fewer or smaller pods, or more nodes"
    asked_proof = of_object(pod, f"spec.containers[].resources.requests[{barrier.what}]", told(barrier.what, asked))
    return said, way_out, [asked_proof]


def _tenants(scene: Scene, barrier: Barrier) -> Counter[str]:
    """Who holds a resource of these nodes: the runs and other owners of the pods there."""
    held: Counter[str] = Counter()
    names = set(barrier.only)
    for pod in scene.snapshot.of("Pod"):
        if pod["spec"].get("nodeName") in names and (pod.get("status") or {}).get("phase") in ("Pending", "Running"):
            value = requests_of(pod["spec"]).get(barrier.what)
            if value:
                held[_owner(pod)] += value  # pyright: ignore[reportArgumentType]
    return held


def _owner(pod: Object) -> str:
    meta = pod["metadata"]
    run = (meta.get("labels") or {}).get("orchestrator/run")
    owner = next(iter(meta.get("ownerReferences") or []), None)
    return str(run or (owner["name"] if owner else meta["name"]))


def _most(held: Counter[str], resource: str) -> str:
    first = ", ".join(f"{name} ({told(resource, Decimal(value))})" for name, value in held.most_common(3))
    return first + (f" and {len(held) - 3} more" if len(held) > 3 else "")


def _taints(scene: Scene, pod: Object, barrier: Barrier) -> Told:
    if not barrier.nodes:  # the nodes are not known, and the scheduler names no taint
        said = f"{barrier.count} nodes have a taint that its pods do not tolerate"
        return said, "cluster.tolerations=[...]: `kubectl describe nodes` shows the taints", []
    said = f"{barrier.count} nodes have the taint {barrier.what}, which its pods do not tolerate"
    node = scene.named("Node", barrier.nodes[0]) or {}
    proof = of_object({**node, "kind": "Node"}, "spec.taints", barrier.what)
    return said, f"cluster.tolerations=['{barrier.what}'], if these nodes are meant for it", [proof]


def _affinity(scene: Scene, pod: Object, barrier: Barrier) -> Told:
    selector = pod["spec"].get("nodeSelector") or {}
    wanted = ", ".join(f"{key}={value}" for key, value in selector.items()) or "its node affinity"
    said = f"{barrier.count} nodes are not what it asks for ({wanted})"
    extra = [of_object(pod, "spec.nodeSelector", selector or pod["spec"].get("affinity"))]
    there = _values(scene, selector)
    way_out = f"another cluster.node_selector; there is {there}" if there else "another cluster.node_selector"
    return said, way_out, extra


def _values(scene: Scene, selector: Mapping[str, str]) -> str:
    """The values that nodes have for the labels of a selector."""
    found: dict[str, set[str]] = defaultdict(set)
    for node in scene.snapshot.of("Node"):
        for key in selector:
            value = (node["metadata"].get("labels") or {}).get(key)
            if value is not None:
                found[key].add(value)
    return "; ".join(f"{key}: {', '.join(sorted(values)[:6])}" for key, values in sorted(found.items()))


def _cordoned(scene: Scene, pod: Object, barrier: Barrier) -> Told:
    said = f"{barrier.count} nodes take nothing new for now ({barrier.what.removeprefix('node(s) ')})"
    return said, "wait, or let the operator of the cluster look at these nodes", []
