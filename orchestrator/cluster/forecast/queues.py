"""The layer of Kueue: the queue's quota by flavor, what it may borrow, who is ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from orchestrator.cluster.forecast.amounts import ZERO, amounts, short, times, told
from orchestrator.cluster.forecast.answer import Finding, Object, Surroundings, Verdict, named, unchecked
from orchestrator.cluster.forecast.demand import Group
from orchestrator.cluster.forecast.nodes import Node, barred
from orchestrator.cluster.forecast.pools import Cell, Pool, pools_of
from orchestrator.cluster.kubernetes.states import QUEUE

LAYER = "queue"
DISK = "ephemeral-storage"
QUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"


@dataclass(slots=True)
class ClusterQueue:
    """One ClusterQueue with its pools."""

    obj: Object
    pools: dict[Cell, Pool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.obj["metadata"]["name"])

    @property
    def spec(self) -> Object:
        return self.obj.get("spec") or {}


def judge_queue(run: Object, groups: Sequence[Group], around: Surroundings) -> Finding:
    """Whether Kueue would admit the run now, later, or never."""
    labels = run["metadata"].get("labels") or {}
    name = labels.get(QUEUE)
    if name is None:
        return Finding(LAYER, Verdict.fits, "the run waits in no queue")
    missing = unchecked(LAYER, around, "LocalQueue")
    if missing:
        return missing
    local = named(around.of("LocalQueue"), name)
    if local is None:
        others = ", ".join(one["metadata"]["name"] for one in around.of("LocalQueue"))
        said = f"namespace {around.namespace} has no LocalQueue {name}"
        return Finding(LAYER, Verdict.never, said, f"cluster.queue=one of {others}" if others else "cluster.queue=null")
    missing = unchecked(LAYER, around, "ClusterQueue", "ResourceFlavor")
    if missing:
        return missing
    obj = named(around.of("ClusterQueue"), local["spec"]["clusterQueue"])
    if obj is None:
        said = f"{name} belongs to ClusterQueue {local['spec']['clusterQueue']}, which is not there"
        return Finding(LAYER, Verdict.never, said, "another cluster.queue")
    queue = ClusterQueue(obj, pools_of(obj, around.of("ClusterQueue")))
    return _closed(queue, local, around) or _judge(queue, labels, groups, around)


def _closed(queue: ClusterQueue, local: Object, around: Surroundings) -> Finding | None:
    """A queue that admits nothing as it stands."""
    for one in (queue.obj, local):
        policy = (one.get("spec") or {}).get("stopPolicy") or "None"
        if policy != "None":
            said = f"{one['metadata']['name']} is on hold (stopPolicy {policy})"
            return Finding(LAYER, Verdict.waits, said)
    for one in (queue.obj, local):
        for condition in (one.get("status") or {}).get("conditions") or []:
            if condition["type"] == "Active" and condition["status"] == "False":
                said = f"{one['metadata']['name']} is not active: {condition.get('message', '')}"
                return Finding(LAYER, Verdict.never, said, "another cluster.queue, or whoever runs Kueue mends it")
    wanted = (queue.spec.get("namespaceSelector") or {}).get("matchLabels") or {}
    spaces = [] if around.unread("Namespace") else around.of("Namespace")
    space = named(spaces, around.namespace)
    have = ((space or {}).get("metadata") or {}).get("labels") or {}
    lacking = {key: value for key, value in wanted.items() if space and have.get(key) != value}
    if lacking:
        pairs = ", ".join(f"{key}={value}" for key, value in lacking.items())
        said = f"{queue.name} takes only namespaces with the label {pairs}"
        return Finding(LAYER, Verdict.never, said, "another cluster.namespace or cluster.queue")
    return None


def _judge(queue: ClusterQueue, labels: Object, groups: Sequence[Group], around: Surroundings) -> Finding:
    flavors = around.of("ResourceFlavor")
    bare = _uncovered(queue, groups)
    if bare:
        way_out = "cluster.disk_gib=0" if bare == [DISK] else f"quota for {', '.join(bare)}, or another cluster.queue"
        return Finding(LAYER, Verdict.never, f"{queue.name} has no quota for {', '.join(bare)}", way_out)
    ever = _assign(queue, groups, flavors, lambda pool: pool.ever)
    if ever is not None:
        return Finding(LAYER, Verdict.never, f"{queue.name}: {ever}", _smallest(queue, groups, flavors))
    now = _assign(queue, groups, flavors, lambda pool: pool.now)
    ahead = _ahead(queue, labels, around)
    strict = queue.spec.get("queueingStrategy") == "StrictFIFO"
    if now is None and not (strict and ahead):
        return Finding(LAYER, Verdict.fits, f"{queue.name} has room for it now")
    freed = _preempting(queue, labels, around)
    if _assign(queue, groups, flavors, freed) is None and not (strict and ahead):
        return Finding(
            LAYER, Verdict.fits, f"{queue.name} has room once it preempts what is of lower priority or borrowed"
        )
    said = f"{queue.name}: {now or 'admits in the order of arrival'}"
    return Finding(LAYER, Verdict.waits, said + (f"; ahead: {', '.join(ahead)}" if ahead else ""))


def _uncovered(queue: ClusterQueue, groups: Sequence[Group]) -> list[str]:
    """Resources of the pods that the queue knows nothing of: it admits none that asks for one."""
    covered = {name for part in queue.spec.get("resourceGroups") or [] for name in part["coveredResources"]}
    asked = {name for group in groups for name, value in group.requests.items() if value}
    return sorted(asked - covered - {"pods"})


def _assign(
    queue: ClusterQueue, groups: Sequence[Group], flavors: Sequence[Object], room: Callable[[Pool], Decimal]
) -> str | None:
    """Give each group a flavor in each resource group, in the queue's order; returns why that cannot be done."""
    left = {cell: room(pool) for cell, pool in queue.pools.items()}
    for group in groups:
        need = {name: value for name, value in times(group.requests, group.count).items() if value}
        for part in queue.spec.get("resourceGroups") or []:
            mine = {name: need[name] for name in part["coveredResources"] if name in need}
            if not mine:
                continue
            chosen, why = _flavor_of(part, mine, group, flavors, left)
            if chosen is None:
                return why
            for name, value in mine.items():
                left[chosen, name] -= value
    return None


def _flavor_of(
    part: Object, need: Mapping[str, Decimal], group: Group, flavors: Sequence[Object], left: Mapping[Cell, Decimal]
) -> tuple[str | None, str]:
    reasons = []
    for flavor in part["flavors"]:
        name = flavor["name"]
        bars = _bars(named(flavors, name), group)
        if bars:
            reasons.append(f"flavor {name}: {bars}")
            continue
        lacking = next((one for one in need if need[one] > left[name, one]), None)
        if lacking is None:
            return name, ""
        have = max(left[name, lacking], ZERO)
        wish = f"{told(lacking, need[lacking])} {short(lacking)} needed"
        reasons.append(f"flavor {name}: {wish}, {told(lacking, have)} there")
    return None, "; ".join(reasons)


def _bars(flavor: Object | None, group: Group) -> str | None:
    """Why a flavor is not for these pods: its labels against their selector, its taints."""
    if flavor is None:
        return "is not there"
    spec = flavor.get("spec") or {}
    labels = spec.get("nodeLabels") or {}
    tolerations = [*(group.spec.get("tolerations") or []), *(spec.get("tolerations") or [])]
    selector = {key: value for key, value in (group.spec.get("nodeSelector") or {}).items() if key in labels}
    pods = Group(group.role, 1, {"tolerations": tolerations, "nodeSelector": selector}, {}, {}, {})
    reason = barred(pods, Node(flavor["metadata"]["name"], labels, tuple(spec.get("nodeTaints") or []), {}, {}, ()))
    return f"its nodes {reason}" if reason else None


def _smallest(queue: ClusterQueue, groups: Sequence[Group], flavors: Sequence[Object]) -> str:
    """The most pods of the greatest group that the queue could ever admit."""
    group = max(groups, key=lambda one: one.count)
    for count in range(group.count - 1, 0, -1):
        few = Group(group.role, count, group.spec, group.labels, group.requests, group.limits)
        rest = [few if one is group else one for one in groups]
        if _assign(queue, rest, flavors, lambda pool: pool.ever) is None:
            return f"compute.num_nodes={count} with {count}/{group.count} of the processes, or another cluster.queue"
    return "another cluster.queue, or a greater quota"


def _ahead(queue: ClusterQueue, labels: Object, around: Surroundings) -> list[str]:
    """Workloads of this namespace that wait for the same queue with at least this priority, and how many in all."""
    if around.unread("Workload"):
        return []
    locals_ = {one["metadata"]["name"] for one in around.of("LocalQueue") if one["spec"]["clusterQueue"] == queue.name}
    own = _priority(labels, around)
    waiting = [
        one
        for one in around.of("Workload")
        if one["spec"].get("queueName") in locals_ and _waits(one) and int(one["spec"].get("priority") or 0) >= own
    ]
    waiting.sort(key=lambda one: (-int(one["spec"].get("priority") or 0), one["metadata"]["creationTimestamp"]))
    names = [f"{_owner(one)} since {one['metadata']['creationTimestamp']}" for one in waiting]
    more = int((queue.obj.get("status") or {}).get("pendingWorkloads") or 0) - len(names)
    return [*names, f"{more} of other namespaces or lower priority"] if more > 0 and names else names


def _waits(workload: Object) -> bool:
    conditions = {c["type"]: c["status"] for c in (workload.get("status") or {}).get("conditions") or []}
    done = conditions.get("QuotaReserved") == "True" or conditions.get("Finished") == "True"
    return workload["spec"].get("active", True) and not done


def _owner(workload: Object) -> str:
    owners = workload["metadata"].get("ownerReferences") or []
    return str(owners[0]["name"] if owners else workload["metadata"]["name"])


def _priority(labels: Object, around: Surroundings) -> int:
    name = labels.get(QUEUE_PRIORITY)
    classes = [] if around.unread("WorkloadPriorityClass") else around.of("WorkloadPriorityClass")
    found = named(classes, name) if name else None
    return int(found["value"]) if found else 0


def _preempting(queue: ClusterQueue, labels: Object, around: Surroundings) -> Callable[[Pool], Decimal]:
    """Room by pool after the preemptions that the queue allows."""
    rules = queue.spec.get("preemption") or {}
    own, lower = _priority(labels, around), dict[Cell, Decimal]()
    if rules.get("withinClusterQueue", "Never") != "Never" and not around.unread("Workload"):
        for one in around.of("Workload"):
            admission = (one.get("status") or {}).get("admission") or {}
            if admission.get("clusterQueue") == queue.name and int(one["spec"].get("priority") or 0) < own:
                _add_usage(lower, admission)
    takes_back = rules.get("reclaimWithinCohort", "Never") != "Never"
    cells = {id(pool): cell for cell, pool in queue.pools.items()}

    def room(pool: Pool) -> Decimal:
        base = pool.after_taking_back if takes_back else pool.now
        return base + lower.get(cells[id(pool)], ZERO)

    return room


def _add_usage(sums: dict[Cell, Decimal], admission: Object) -> None:
    for part in admission.get("podSetAssignments") or []:
        for name, value in amounts(part.get("resourceUsage")).items():
            cell = (part["flavors"][name], name)
            sums[cell] = sums.get(cell, ZERO) + value
