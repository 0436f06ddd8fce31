"""What each layer says to a run: FITS, WAITS behind what, or NEVER with the arithmetic and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from clusters import (
    CPU_RUN,
    GPU_RUN,
    NVIDIA,
    but,
    cluster_queue,
    flavor,
    healthy,
    limit,
    local_queue,
    node,
    pod,
    quota,
    sent,
    used,
    workload,
)

from orchestrator.cluster.forecast.answer import Finding, Verdict
from orchestrator.cluster.forecast.demand import Share
from orchestrator.cluster.forecast.forecast import Forecast, forecast
from orchestrator.cluster.snapshot import Snapshot
from orchestrator.options import JobKind

QUEUED = (*CPU_RUN, "cluster.queue=train")
BORROWS_TWO = {"nominalQuota": "5", "borrowingLimit": "2"}
Around = Callable[[], Snapshot]
Case = tuple[tuple[str, ...], Around, str, Verdict, tuple[str, ...], str | None]
FITS, WAITS, NEVER, UNCHECKED = Verdict.fits, Verdict.waits, Verdict.never, Verdict.unchecked


def kueue(*queues: Any, **more: Any) -> Around:
    around = {"LocalQueue": [local_queue()], "ClusterQueue": list(queues), "ResourceFlavor": [flavor()],
              "Workload": [], "WorkloadPriorityClass": []}  # fmt: skip
    return but(**{**around, **more})


# run, cluster, layer, verdict, words of what is said, words of the way out
CASES: dict[str, Case] = {
    "room on two free nodes": (CPU_RUN, healthy, "nodes", FITS, ("2 x (4 cpu",), None),
    "pods that ended hold nothing": (
        CPU_RUN, but(Pod=[pod("old", one, "Succeeded", cpu="30") for one in "ab"]), "nodes", FITS, (), None,
    ),
    "others hold the CPUs": (
        CPU_RUN, but(Node=[node("a", cpu=9)], Pod=[pod("x", "a", cpu="4")]), "nodes", WAITS,
        ("room for 1 of 2", "behind other/x (4 cpu since 2026-01-01T09:00:00Z)"), None,
    ),
    "what a daemon set holds never comes free": (
        CPU_RUN, but(Node=[node("a", cpu=9)], Pod=[pod("x", "a", owner="DaemonSet", cpu="4")]), "nodes", NEVER,
        ("never hold more than 1 of 2",), "cluster.cpus_per_process=2.5",
    ),
    "no node has so much memory": (
        (*CPU_RUN, "cluster.memory_gib_per_process=500"), healthy, "nodes", NEVER, ("have 128 GiB memory",),
        "cluster.memory_gib_per_process",
    ),
    "GPUs of eight on nodes of four": (
        GPU_RUN, but(Node=[node(f"g{i}", gpus=4) for i in range(4)], Pod=[]), "nodes", NEVER,
        ("2 x (8 GPU", "have 4 GPU"), "compute.num_nodes=4 with as many processes",
    ),
    "fewer nodes than the run wants": (
        GPU_RUN, but(Node=[node("g1", gpus=8)], Pod=[]), "nodes", NEVER, ("never hold more than 1 of 2",),
        "compute.num_nodes=1",
    ),
    "a taint that nobody tolerates": (
        CPU_RUN, but(Node=[node(one, taints=[{"key": "team", "value": "x", "effect": "NoSchedule"}]) for one in "ab"]),
        "nodes", NEVER, ("2 have the taint team=x:NoSchedule",), "cluster.tolerations=[team=x:NoSchedule]",
    ),
    "the same taint tolerated": (
        (*CPU_RUN, "cluster.tolerations=['team=x:NoSchedule']"),
        but(Node=[node(one, taints=[{"key": "team", "value": "x", "effect": "NoSchedule"}]) for one in "ab"]),
        "nodes", FITS, (), None,
    ),
    "a taint that only discourages": (
        CPU_RUN, but(Node=[node("a", taints=[{"key": "team", "effect": "PreferNoSchedule"}])]), "nodes", FITS, (), None,
    ),
    "a label that no node has": (
        (*CPU_RUN, "cluster.node_selector=['pool=fast']"), healthy, "nodes", NEVER, ("lack the label pool=fast",),
        "cluster.node_selector without pool",
    ),
    "GPU nodes are tolerated": (GPU_RUN, healthy, "nodes", FITS, (), None),
    "a cordoned node comes back": (
        CPU_RUN, but(Node=[node("a", unschedulable=True)]), "nodes", WAITS, ("1 nodes are unschedulable",), None,
    ),
    "a node that is not ready comes back": (
        CPU_RUN, but(Node=[node("a", ready="False")]), "nodes", WAITS, ("1 nodes are not-ready",), None,
    ),
    "two nodes for two pods that must lie apart": (
        (*CPU_RUN, "cluster.spread=spread"), but(Node=[node("a"), node("b", cpu=5)]), "nodes", FITS, (), None,
    ),
    "a node that is too small counts where pods must lie apart": (
        (*CPU_RUN, "cluster.spread=spread"), but(Node=[node("a"), node("b", cpu=2)]), "nodes", NEVER,
        ("never hold more than 1 of 2",), "cluster.spread=any",
    ),
    "five pods that must lie apart on two uneven nodes": (
        (*CPU_RUN, "cluster.spread=spread", "compute.num_nodes=5", "compute.num_processes=5"),
        but(Node=[node("a", cpu=64), node("b", cpu=5)]), "nodes", NEVER, ("more than 1 pod above another",),
        "cluster.spread=any",
    ),
    "two zones for pods that must lie in one": (
        (*CPU_RUN, "cluster.spread=pack", "cluster.topology=topology.kubernetes.io/zone"),
        but(Node=[node("a", cpu=5, zone="x"), node("b", cpu=5, zone="y")]), "nodes", NEVER, ("within one",),
        "cluster.spread=any",
    ),
    "lower priorities make room": (
        (*CPU_RUN, "cluster.priority=high"),
        but(Node=[node("a", cpu=9)], Pod=[pod("x", "a", cpu="8", priority=5)],
            PriorityClass=[{"metadata": {"name": "high"}, "value": 100}]),
        "nodes", FITS, ("lower priority", "other/x"), None,
    ),
    "nodes that may not be read": (CPU_RUN, but(Node=None), "nodes", UNCHECKED, ("no right to list nodes",), None),
    "within the quota": (CPU_RUN, but(ResourceQuota=[quota(requests_cpu="8")]), "quota", FITS, ("within team",), None),
    "a quota too small": (
        CPU_RUN, but(ResourceQuota=[quota(requests_cpu="7")]), "quota", NEVER, ("needs 8 requests.cpu", "of 7"),
        "at most 7 requests.cpu",
    ),
    "a quota that others fill": (
        CPU_RUN, but(ResourceQuota=[used(quota(requests_cpu="10"), requests_cpu="4")]), "quota", WAITS,
        ("needs 8 requests.cpu, 4 of 10 are taken",), None,
    ),
    "a quota on limits that the pods do not name": (
        CPU_RUN, but(ResourceQuota=[quota(limits_cpu="100")]), "quota", NEVER, ("pods that name none are refused",),
        "LimitRange",
    ),
    "a quota on memory limits": (
        CPU_RUN, but(ResourceQuota=[quota(limits_memory="1Gi")]), "quota", NEVER, ("of 1 GiB",), "limits.memory",
    ),
    "a quota on jobs": (
        CPU_RUN, but(ResourceQuota=[used(quota(**{"count/jobs_batch": "3"}), **{"count/jobs_batch": "3"})]), "quota",
        WAITS, ("needs 1 count/jobs.batch",), None,
    ),
    "a quota on GPUs": (
        GPU_RUN, but(ResourceQuota=[quota(**{"requests_nvidia_com/gpu": "8"})]), "quota", NEVER,
        ("needs 16 requests.nvidia.com/gpu",), "at most 8",
    ),
    "a quota for pods that end": (
        CPU_RUN, but(ResourceQuota=[{**quota(pods="0"), "spec": {"hard": {"pods": "0"}, "scopes": ["Terminating"]}}]),
        "quota", FITS, (), None,
    ),
    "a limit range below the memory": (
        CPU_RUN, but(LimitRange=[limit(max={"memory": "4Gi"})]), "limit range", NEVER, ("at most 4 GiB are allowed",),
        "cluster.memory_gib_per_process",
    ),
    "a default limit below the request": (
        CPU_RUN, but(LimitRange=[limit(default={"cpu": "1"})]), "limit range", NEVER,
        ("asks for 4 cpu, above the default limit of 1",), "default",
    ),
    "a limit range above the request": (
        CPU_RUN, but(LimitRange=[limit(min={"cpu": "8"})]), "limit range", NEVER, ("at least 8 are wanted",),
        "cluster.cpus_per_process",
    ),
    "a limit range for whole pods": (
        CPU_RUN, but(LimitRange=[limit("Pod", max={"memory": "64Gi"})]), "limit range", FITS, (), None,
    ),
    "no such queue": (
        QUEUED, but(LocalQueue=[local_queue("other")]), "queue", NEVER, ("no LocalQueue train",),
        "cluster.queue=one of other",
    ),
    "a queue with room": (QUEUED, kueue(cluster_queue()), "queue", FITS, ("room for it now",), None),
    "a queue too small": (
        QUEUED, kueue(cluster_queue(nominal={"cpu": "5", "memory": "256Gi"})), "queue", NEVER,
        ("flavor default: 8 cpu needed, 5 there",), "compute.num_nodes=1",
    ),
    "a queue that is full, and who is ahead": (
        QUEUED, kueue(cluster_queue(taken={"cpu": "60", "memory": "1Gi"}), Workload=[workload("early")]), "queue",
        WAITS, ("8 cpu needed, 4 there", "ahead: early since 2026-01-01T10:00:00Z"), None,
    ),
    "a queue in the strict order of arrival": (
        QUEUED, kueue(cluster_queue(queueingStrategy="StrictFIFO"), Workload=[workload("early")]), "queue", WAITS,
        ("order of arrival", "early"), None,
    ),
    "a queue that preempts what is lower": (
        (*QUEUED, "cluster.priority=high"),
        kueue(cluster_queue(taken={"cpu": "60", "memory": "1Gi"}, preemption={"withinClusterQueue": "LowerPriority"}),
              Workload=[workload("low", admitted={"cpu": "60", "memory": "1Gi"})],
              WorkloadPriorityClass=[{"metadata": {"name": "high"}, "value": 100}]),
        "queue", FITS, ("once it preempts",), None,
    ),
    "a queue without quota for a resource": (
        (*GPU_RUN, "cluster.queue=train"), kueue(cluster_queue()), "queue", NEVER, ("no quota for nvidia.com/gpu",), "",
    ),
    "a queue that borrows in its cohort": (
        QUEUED,
        kueue(cluster_queue(nominal={"cpu": "5", "memory": "256Gi"}, cohort="c"), cluster_queue("rich", cohort="c")),
        "queue", FITS, (), None,
    ),
    "a queue that may borrow too little": (
        QUEUED,
        kueue(cluster_queue(nominal={"cpu": BORROWS_TWO, "memory": "256Gi"}, cohort="c"),
              cluster_queue("rich", cohort="c")),
        "queue", NEVER, ("8 cpu needed, 7 there",), "",
    ),
    "a cohort whose other queue lends nothing": (
        QUEUED,
        kueue(cluster_queue(nominal={"cpu": "5", "memory": "256Gi"}, cohort="c"),
              cluster_queue("mean", nominal={"cpu": {"nominalQuota": "64", "lendingLimit": "0"}, "memory": "9Gi"},
                            cohort="c")),
        "queue", NEVER, ("8 cpu needed, 5 there",), "",
    ),
    "a cohort that others have borrowed from": (
        QUEUED,
        kueue(cluster_queue(nominal={"cpu": "16", "memory": "256Gi"}, cohort="c"),
              cluster_queue("greedy", nominal={"cpu": "4", "memory": "9Gi"}, taken={"cpu": "18"}, cohort="c")),
        "queue", WAITS, ("8 cpu needed, 2 there",), None,
    ),
    "the same, and the queue takes back what is its own": (
        QUEUED,
        kueue(cluster_queue(nominal={"cpu": "16", "memory": "256Gi"}, cohort="c",
                            preemption={"reclaimWithinCohort": "Any"}),
              cluster_queue("greedy", nominal={"cpu": "4", "memory": "9Gi"}, taken={"cpu": "18"}, cohort="c")),
        "queue", FITS, ("preempts",), None,
    ),
    "a flavor whose taint is not tolerated": (
        QUEUED,
        kueue(cluster_queue(), ResourceFlavor=[flavor(nodeTaints=[NVIDIA])]), "queue", NEVER,
        ("flavor default: its nodes have the taint",), "",
    ),
    "a queue on hold": (QUEUED, kueue(cluster_queue(stopPolicy="Hold")), "queue", WAITS, ("on hold",), None),
    "a queue for other namespaces": (
        QUEUED, kueue(cluster_queue(namespaceSelector={"matchLabels": {"team": "x"}})), "queue", NEVER, ("team=x",), "",
    ),
    "queues that may not be read": (
        QUEUED, but(LocalQueue=[local_queue()], ClusterQueue=None, ResourceFlavor=None), "queue", UNCHECKED,
        ("no right to list clusterqueues",), None,
    ),
    "a claim that is missing": (
        CPU_RUN, but(PersistentVolumeClaim=[{"metadata": {"name": "run"}, "spec": {}, "status": {"phase": "Bound"}}]),
        "presence", NEVER, ("PersistentVolumeClaim data is not there",), "cluster.volumes",
    ),
    "a secret that is missing": (
        (*CPU_RUN, "tracking=online", "tracking.secret=wandb/key"), healthy, "presence", NEVER,
        ("Secret wandb is not there",), "tracking.secret",
    ),
    "secrets that may not be read": (
        (*CPU_RUN, "tracking=online", "tracking.secret=wandb/key"), but(Secret=None), "presence", UNCHECKED,
        ("Secret wandb: not checked: no right",), None,
    ),
    "a class that is not there": (
        CPU_RUN,
        but(PersistentVolumeClaim=[{"metadata": {"name": name}, "spec": {"storageClassName": "fast"},
                                    "status": {"phase": "Pending"}} for name in ("runs", "data")]),
        "presence", NEVER, ("no StorageClass fast (the cluster has shared)",), "another class",
    ),
    "an image that no node has yet": (
        CPU_RUN, but(Node=[node("a", images=[])]), "image", UNCHECKED, ("is on no node yet",), None,
    ),
    "RDMA in a restricted namespace": (
        (*GPU_RUN, "cluster.rdma=rdma/hca"), healthy, "pod security", NEVER, ("adds IPC_LOCK",), "cluster.rdma=null",
    ),
    "no right to create jobs": (
        CPU_RUN, but(SelfSubjectRulesReview=[{"status": {"resourceRules": [
            {"apiGroups": [""], "resources": ["*"], "verbs": ["*"]}]}}]),
        "rights", NEVER, ("no right to create jobs",), "submitter",
    ),
}  # fmt: skip


def ahead(objects: list[Any], around: Snapshot) -> Forecast:
    return forecast(objects, around, Share())


def of_layer(found: Forecast, layer: str) -> Finding:
    return max((one for one in found.findings if one.layer == layer), key=lambda one: one.verdict)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_layer_says_what_it_would_do_and_the_way_out(case: Case) -> None:
    overrides, around, layer, verdict, words, way_out = case
    found = ahead(sent(*overrides), around())
    finding = of_layer(found, layer)
    assert finding.verdict is verdict, finding
    for word in words:
        assert word in finding.said
    if way_out is None:
        assert finding.way_out is None
    else:
        assert way_out in (finding.way_out or "")
    assert found.verdict >= verdict
    assert found.verdict.word in ("FITS", "WAITS", "NEVER")


@pytest.mark.parametrize("kind", [kind for kind in JobKind if kind is not JobKind.auto])
def test_a_healthy_cluster_takes_every_kind(kind: JobKind) -> None:
    found = ahead(sent(*CPU_RUN, kind=kind), healthy())
    assert found.verdict is FITS, [one for one in found.findings if one.verdict]
    assert json.loads(json.dumps(found.facts()))["verdict"] == "fits"


def test_the_way_out_of_a_run_that_never_fits_makes_it_fit() -> None:
    nodes = but(Node=[node(f"g{i}", gpus=4) for i in range(4)], Pod=[])
    never = of_layer(ahead(sent(*GPU_RUN), nodes()), "nodes")
    assert never.verdict is NEVER
    assert "compute.num_nodes=4" in (never.way_out or "")
    changed = [one for one in GPU_RUN if not one.startswith("compute.num_nodes")]
    assert of_layer(ahead(sent(*changed, "compute.num_nodes=4"), nodes()), "nodes").verdict is FITS
