"""One change to a healthy cluster each, and the cause that must come first: what ended a run or takes it away."""

from __future__ import annotations

from scenes import RUN, SPACE, World, condition, ended, event, failed, meta, pod

LIMIT = ("BackoffLimitExceeded", "Job has reached the specified backoff limit")
WATCHDOG = (
    "[rank{0}]:[E ProcessGroupNCCL.cpp:616] [Rank {0}] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum={1}, OpType=ALLREDUCE, NumelIn=11, NumelOut=11, Timeout(ms)=600000) ran for 600029 milliseconds "
    "before timing out."
)
CUDA = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
PEER = "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.77.0.7]:38211"
CONFIG = (
    "recipe.global_batch_size = 7: must be at least 8, one for each virtual rank. Way out: recipe.global_batch_size=8"
)
DATA = (
    "/data/train-000001.tar sample 17: not an image. Way out: data.on_bad=skip leaves such images out and counts them; "
)
DATA += "`orchestrator shards verify` names them all"


def _both(world: World, code: int, error: str | None, *, rank: int = 0, victim: int = 75) -> None:
    """One node fails, the other leaves because of it, with the same words."""
    first, second = world.pods
    ended(first, code, error, rank=rank, at="2026-01-01T10:08:00Z")
    ended(second, victim, error, rank=rank, at="2026-01-01T10:08:01Z")
    failed(world, *LIMIT)


def out_of_memory(world: World) -> None:
    _both(world, 75, PEER)
    ended(world.pods[1], 137, reason="OOMKilled")


def out_of_less_memory_than_predicted(world: World) -> None:
    out_of_memory(world)
    world.record["predicted"] = {"memory": "2 x 5.1 GiB = 10.2 GiB for a step", "gib_per_process": 7.25}


def out_of_memory_where_a_quota_kept_the_other_pod_away(world: World) -> None:
    """Made anew after the first failure, which left no room in the quota: that ended nothing."""
    text = f'Error creating: pods "{RUN}-1-abcde" is forbidden: exceeded quota: team, requested: pods=1, '
    world.add("Event", event(world.run, "FailedCreate", f"{text}used: pods=4, limited: pods=4"))
    ended(world.pods[0], 137, reason="OOMKilled")
    world.objects["Pod"] = [pod for pod in world.objects["Pod"] if pod is not world.pods[1]]
    failed(world, *LIMIT)


def out_of_memory_and_restarted_by_itself(world: World) -> None:
    """Both pods were made anew and do not run yet."""
    out_of_memory(world)
    world.run["status"] = {"active": 2, "failed": 2}
    world.record = {}
    for index in (0, 1):
        fresh = pod(index, None, suffix="bbbbb")
        fresh["metadata"]["creationTimestamp"] = "2026-01-01T10:09:59Z"
        fresh["status"] = {"phase": "Pending", "conditions": []}
        world.add("Pod", fresh)


def evicted_for_memory(world: World) -> None:
    text = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 20Mi. Container node was "
    text += "using 9Gi, request is 8Gi, has larger consumption of memory. "
    world.pods[0]["status"] = {"phase": "Failed", "reason": "Evicted", "message": text}
    ended(world.pods[1], 75, PEER, rank=1)
    failed(world, *LIMIT)


def disk_of_the_pod_full(world: World) -> None:
    text = 'Usage of EmptyDir volume "tmp" exceeds the limit "1Gi". '
    world.pods[0]["status"] = {"phase": "Failed", "reason": "Evicted", "message": text}
    failed(world, *LIMIT)


def disk_of_the_node_full(world: World) -> None:
    text = "The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, available: 900Mi. "
    world.pods[0]["status"] = {"phase": "Failed", "reason": "Evicted", "message": text}
    failed(world, *LIMIT)


def disk_full(world: World) -> None:
    _both(world, 44, "/runs/digits: disk full. Way out: free space, or write to another disk (runs_dir=... for runs)")


def preempted_by_the_scheduler(world: World) -> None:
    """Its pod is gone with its node; the new one finds no place. The event tells by whom."""
    urgent = pod(0, "node-a", suffix="urgent")
    urgent["metadata"] |= {"name": "urgent-0", "labels": {"orchestrator/run": "urgent-44444444"}, "ownerReferences": []}
    urgent["metadata"]["uid"] = "0a1b2c3d-0000-4444-8888-aaaaaaaaaaaa"
    urgent["spec"]["priority"] = 1000
    victim = world.pods[0]
    ended(victim, 143, None, rank=None)
    victim["status"]["conditions"] = [
        condition(
            "DisruptionTarget",
            "True",
            "PreemptionByScheduler",
            "default-scheduler: preempting to accommodate a higher priority pod",
        )
    ]
    world.add("Pod", urgent)
    text = "Preempted by pod 0a1b2c3d-0000-4444-8888-aaaaaaaaaaaa on node node-a"
    world.add("Event", event(victim, "Preempted", text, kind="Normal"))
    ended(world.pods[1], 143, None, rank=None)
    world.run["status"] = {"active": 0}
    world.record = {}


def drained(world: World) -> None:
    victim = world.pods[0]
    ended(victim, 143, None, rank=None)
    victim["status"]["conditions"] = [
        condition("DisruptionTarget", "True", "EvictionByEvictionAPI", "Eviction API: evicting")
    ]
    world.run["status"] = {"active": 1}
    world.record = {}


def node_does_not_answer(world: World) -> None:
    lost = world.objects["Node"][1]
    lost["status"]["conditions"] = [
        condition(
            "Ready", "Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.", "2026-01-01T10:07:00Z"
        )
    ]
    lost["spec"]["taints"] = [{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}]
    world.add("Event", event(world.pods[1], "NodeNotReady", "Node is not ready"))


def node_gone(world: World) -> None:
    del world.objects["Node"][1]


def node_was_lost(world: World) -> None:
    victim = world.pods[1]
    victim["status"] = {"phase": "Failed", "conditions": [
        condition("DisruptionTarget", "True", "DeletionByPodGC", "PodGC: node no longer exists")]}  # fmt: skip
    ended(world.pods[0], 75, "node 1 is gone: silent for 8 s", rank=None)
    world.run["status"] = {"active": 0}
    world.record = {}


def user_error(world: World) -> None:
    _both(world, 42, CONFIG)
    text = f"Container node for pod {SPACE}/{RUN}-0-aaaaa failed with exit code 42 matching FailJob rule at index 0"
    failed(world, "PodFailurePolicy", text)


def data_error(world: World) -> None:
    _both(world, 42, DATA, rank=1)


def wrong_code(world: World) -> None:
    _both(
        world,
        42,
        "this node imported code 0123456789ab, and the run was submitted with ba9876543210. Way out: submit again",
    )


def not_finite(world: World) -> None:
    text = "recipe.on_nan = stop: training diverged: the loss of step 40 is not finite on rank 1; its samples are in "
    text += "x.json. Way out: look at these images, a lower optimizer.lr (peak now 0.4)"
    _both(world, 42, text, rank=1)


def gpu_memory(world: World) -> None:
    where = "no progress: the run failed by itself in 3 attempts without getting through its first step"
    _both(world, 43, f"{where}, at last so: {CUDA}. Way out: mend the cause; the same command then goes on")


def peer_left_without_a_word(world: World) -> None:
    _both(world, 1, "ValueError: whatever", rank=1)
    ended(world.pods[0], 75, None, rank=None, at="2026-01-01T10:07:00Z")
    ended(world.pods[1], 1, "ValueError: whatever", rank=1)


def hang(world: World) -> None:
    text = "hung: no sign of life for 61.2 s in phase step after step 40 (cluster.hang_step_s = 60)"
    _both(world, 1, text, rank=1)


def nccl_timeout(world: World) -> None:
    """Four ranks, of which rank 2 says nothing: the others waited for it."""
    _both(world, 1, WATCHDOG.format(0, 41), rank=0)
    lines = [{"attempt": 1, "rank": rank, "lines": [WATCHDOG.format(rank, 41)]} for rank in (0, 1, 3)]
    world.record = {"facts": {"state": "failed", "world_size": 4}, "lines": lines}


def gloo_timeout(world: World) -> None:
    """The peer of the rank that waited was killed from outside."""
    _both(world, 1, "RuntimeError: Timed out waiting 1800000ms for recv operation to complete", rank=0, victim=137)
    ended(world.pods[1], 137, "killed by SIGKILL", rank=1)


def no_first_node(world: World) -> None:
    text = f"node 0 did not come to MASTER_ADDR = {RUN}-0.{RUN}, port 29501 (Name or service not known) within "
    text += "cluster.hang_start_s = 600"
    ended(world.pods[1], 75, text, rank=None)
    failed(world, *LIMIT)
    world.objects["Pod"].remove(world.pods[0])


def device_lost(world: World) -> None:
    _both(
        world, 44, "DeviceError: cuda:3: CUDA error: uncorrectable ECC error encountered. Way out: another node", rank=3
    )


def deadline(world: World) -> None:
    world.run["spec"]["activeDeadlineSeconds"] = 3600
    for one in world.pods:
        ended(one, 143, None, rank=None)
    failed(world, "DeadlineExceeded", "Job was active longer than specified deadline")


def deadline_of_a_jobset(world: World) -> None:
    run = world.objects["Job"].pop()
    late = condition("Failed", "True", "DeadlineExceeded", "Job was active longer than specified deadline")
    text = f"applying FailJobSet failure policy action (first failed job: {RUN}-node-0)"
    ended_set = condition("Failed", "True", "FailJobSetFailurePolicyAction", text)
    template = {"spec": {"activeDeadlineSeconds": 7200}}
    spec = {"suspend": False, "replicatedJobs": [{"name": "node", "template": template}]}
    jobset = world.add("JobSet", {**run, "kind": "JobSet", "spec": spec, "status": {"conditions": [ended_set]}})
    own = {"activeDeadlineSeconds": 7200, "parallelism": 2}
    world.add("Job", {"metadata": meta(f"{RUN}-node-0", jobset), "spec": own, "status": {"conditions": [late]}})
    for one in world.pods:
        ended(one, 143, None, rank=None)
    world.record = {}


def ray_app_failed(world: World) -> None:
    run = world.objects["Job"].pop()
    world.objects["Pod"] = []
    text = (
        "Job entrypoint command failed with exit code 42, last available logs (truncated to 20,000 chars):\n" + CONFIG
    )
    status = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": text}
    world.add("RayJob", {**run, "kind": "RayJob", "spec": {"suspend": False}, "status": status})
    world.record = {"facts": {"state": "failed"}}


def unexplained(world: World) -> None:
    world.objects["Pod"] = []
    failed(world, *LIMIT)


CASES = (
    (out_of_memory, "out-of-memory", ("limit of 8Gi", "cluster.memory_gib_per_process", "OOMKilled")),
    (out_of_less_memory_than_predicted, "out-of-memory", ("2 x 5.1 GiB = 10.2 GiB", "=7.25 should do")),
    (out_of_memory_where_a_quota_kept_the_other_pod_away, "out-of-memory", ("limit of 8Gi",)),
    (out_of_memory_and_restarted_by_itself, "out-of-memory", ("8Gi",)),
    (evicted_for_memory, "evicted", ("low on memory", "node-a")),
    (disk_of_the_pod_full, "disk-full", ("emptyDir tmp", "1Gi")),
    (disk_of_the_node_full, "disk-full", ("ephemeral-storage",)),
    (disk_full, "disk-full", ("/runs/digits", "free space")),
    (preempted_by_the_scheduler, "preempted", ("pod urgent-0", "priority 1000 over 0")),
    (drained, "drained", ("node-a", "kubectl drain")),
    (node_does_not_answer, "node-lost", ("node-b", "Kubelet stopped posting node status")),
    (node_gone, "node-lost", ("node-b", "not there")),
    (node_was_lost, "node-lost", ("node-b",)),
    (user_error, "user-error", ("recipe.global_batch_size = 7", "recipe.global_batch_size=8")),
    (data_error, "data", ("rank 1", "train-000001.tar", "data.on_bad=skip")),
    (wrong_code, "code-differs", ("0123456789ab", "submit again")),
    (not_finite, "not-finite", ("step 40", "a lower optimizer.lr")),
    (gpu_memory, "gpu-memory", ("GPU of rank 0", "recipe.accumulate=2")),
    (peer_left_without_a_word, "crashed", ("rank 1: ValueError",)),
    (hang, "hang", ("rank 1 was late", "61.2 s", "phase step after step 40", "cluster.hang_step_s = 60")),
    (nccl_timeout, "collective-timeout", ("rank 2 did not come", "ranks 0, 1, 3 waited in ALLREDUCE number 41")),
    (gloo_timeout, "killed", ("rank 1", "SIGKILL")),
    (no_first_node, "rank-0-unreachable", ("Name or service not known", f"{RUN}-0.{RUN}")),
    (device_lost, "device-lost", ("rank 3", "ECC")),
    (deadline, "deadline", ("3600 s", "cluster.deadline_s")),
    (deadline_of_a_jobset, "deadline", ("7200 s",)),
    (ray_app_failed, "user-error", ("recipe.global_batch_size = 7",)),
    (unexplained, "failed", ("specified backoff limit",)),
)  # fmt: skip
