"""One state, exit code and reason from what the controllers leave: a table."""

from __future__ import annotations

import json

import pytest
from objects import Object, condition, ended, event, pod, run_object, workload

from orchestrator.cluster.kubernetes.states import Observed, RunState, state_of

QUEUED = "couldn't assign flavors to pod set main: insufficient quota for nvidia.com/gpu"
POLICY = "Container node for pod default/x-0-abc failed with exit code 42 matching FailJob rule at index 0"
FAILED = {"conditions": [condition("Failed", "PodFailurePolicy", POLICY)]}
LIMIT = {"conditions": [condition("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")]}
STOPPED_JOB = {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED", "failed": 1}
WORDS = {"schema": 1, "attempt": 3, "rank": None, "exit_code": 143, "error": "its node goes"}
REASON = "PodFailurePolicy: " + POLICY


def job(**facts: Object) -> Object:
    return run_object(status=dict(facts))


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (Observed(job()), RunState("starting")),
        (Observed(job(), [pod(0), pod(1, node="rig-b")]), RunState("running", nodes=("rig-a", "rig-b"))),
        (Observed(job(), [pod(1, node="rig-b"), pod(0)]), RunState("running", nodes=("rig-a", "rig-b"))),
        (Observed(job(), [pod(0), pod(1, "Pending", node=None)]), RunState("starting", nodes=("rig-a",))),
        # a quota refuses the other one; one that has done its work is still one of two
        (Observed(job(), [pod(0)]), RunState("starting", nodes=("rig-a",))),
        (Observed(job(), [pod(0), pod(1, "Succeeded")]), RunState("running", nodes=("rig-a",))),
        (Observed(job(ready=2, active=2), looked=False), RunState("running")),
        (Observed(job(ready=0, active=2), looked=False), RunState("starting")),
        (Observed(run_object(status={"conditions": [condition("Complete")]})), RunState("done", 0)),
        (
            Observed(run_object("JobSet", status={"conditions": [condition("Completed")], "restarts": 2})),
            RunState("done", 0, restarts=2),
        ),
        (
            Observed(run_object("JobSet", status={"replicatedJobsStatus": [{"ready": 1}]}), looked=False),
            RunState("running"),
        ),
        (Observed(run_object("TrainJob", status={"conditions": [condition("Complete")]})), RunState("done", 0)),
        (Observed(run_object("TrainJob", status={"jobsStatus": [{"ready": 1}]}), looked=False), RunState("running")),
        (
            Observed(run_object("RayJob", status={"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})),
            RunState("done", 0),
        ),
        (
            Observed(
                run_object(
                    "RayJob",
                    status={
                        "jobDeploymentStatus": "Complete",
                        "jobStatus": "FAILED",
                        "message": "driver: exit code 43",
                    },
                )
            ),
            RunState("failed", 43, "driver: exit code 43"),
        ),
        # A driver whose end is final has its own job stopped: its words say what it was.
        (
            Observed(run_object("RayJob", status=STOPPED_JOB), words={"exit_code": 45, "error": None, "attempt": 2}),
            RunState("stopped", 45, None, 2, restarts=1),
        ),
        (
            Observed(
                run_object("RayJob", status=STOPPED_JOB),
                words={"exit_code": 42, "error": "data.train = x: no such set", "attempt": 1, "rank": 1},
            ),
            RunState("failed", 42, "rank 1: data.train = x: no such set", 1, restarts=1),
        ),
        (Observed(run_object("RayJob", status=STOPPED_JOB), looked=False), RunState("stopped", None, restarts=1)),
        (
            Observed(
                run_object(
                    "RayJob",
                    status={
                        "jobDeploymentStatus": "Failed",
                        "jobStatus": "FAILED",
                        "reason": "AppFailed",
                        "failed": 1,
                        "message": "failed with exit code 143, last available logs:\n" + json.dumps(WORDS),
                    },
                )
            ),
            RunState("failed", 143, "its node goes", 3),
        ),
        (
            Observed(
                run_object("RayJob", status={"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}), looked=False
            ),
            RunState("running"),
        ),
        (
            Observed(run_object("RayJob", status={"jobDeploymentStatus": "ValidationFailed", "message": "bad"})),
            RunState("failed", None, "bad"),
        ),
        # Suspended: by us, by a queue, on the way.
        (Observed(run_object(suspend=True)), RunState("stopped", 45, "suspended")),
        (Observed(run_object("JobSet", suspend=True)), RunState("stopped", 45, "suspended")),
        (
            Observed(run_object(suspend=True), [pod(0)]),
            RunState("running", None, "is stopping: 1 pods are saving", nodes=("rig-a",)),
        ),
        (
            Observed(run_object(suspend=True, queue="team")),
            RunState("queued", None, "waits until queue team admits it"),
        ),
        (
            Observed(
                run_object(suspend=True, queue="team"),
                workload=workload(True, condition("QuotaReserved", "Pending", QUEUED, "False")),
            ),
            RunState("queued", None, QUEUED),
        ),
        (
            Observed(
                run_object(suspend=True, queue="team"),
                workload=workload(
                    True,
                    condition("QuotaReserved", "Pending", QUEUED, "False"),
                    condition("Evicted", "Preempted", "Preempted to accommodate a workload"),
                ),
            ),
            RunState("queued", None, f"Preempted to accommodate a workload; {QUEUED}"),
        ),
        (
            Observed(run_object(suspend=True, queue="team"), workload=workload(False)),
            RunState("stopped", 45, "suspended"),
        ),
        (
            Observed(run_object(suspend=True, queue="team", orchestrator__stopped="t")),
            RunState("stopped", 45, "suspended"),
        ),
        # Ended: the pod that explains it counts, not those that left with it.
        (Observed(run_object(status=FAILED)), RunState("failed", 42, REASON)),
        (
            Observed(
                run_object(status=FAILED),
                [
                    pod(1, "Failed", state=ended(75, "peer is gone", rank=2, at="09:00")),
                    pod(0, "Failed", state=ended(42, "data.train = x: no such set", at="10:00")),
                ],
            ),
            RunState("failed", 42, "rank 0 on rig-a: data.train = x: no such set", 1),
        ),
        (
            Observed(
                run_object(status=LIMIT),
                [
                    pod(0, "Failed", state=ended(1, "old", attempt=1)),
                    pod(0, "Failed", suffix="b", state=ended(43, "no progress", attempt=2, rank=None)),
                ],
            ),
            RunState("failed", 43, "digits-0123abcd-0-b on rig-a: no progress", 2),
        ),
        (
            Observed(
                run_object(status=LIMIT),
                [pod(0, "Failed", state={"terminated": {"exitCode": 137, "reason": "OOMKilled"}})],
            ),
            RunState(
                "failed",
                137,
                "digits-0123abcd-0-aaaaa on rig-a: out of memory: the kernel killed it at its limit (OOMKilled)",
            ),
        ),
        (
            Observed(run_object(status=LIMIT), [pod(0, "Failed", reason="Evicted", message="low on resource: memory")]),
            RunState("failed", 143, "digits-0123abcd-0-aaaaa on rig-a: Evicted: low on resource: memory"),
        ),
        (
            Observed(run_object(status={"conditions": [condition("Failed", "DeadlineExceeded", "too long")]})),
            RunState("failed", None, "DeadlineExceeded: too long"),
        ),
        (
            Observed(run_object(status=FAILED), [pod(0, "Failed", state=ended(45, "stopped by its deadline"))]),
            RunState("stopped", 45, "rank 0 on rig-a: stopped by its deadline", 1),
        ),
        (
            Observed(run_object(status={**LIMIT, "failed": 8})),
            RunState("failed", None, "BackoffLimitExceeded: Job has reached the specified backoff limit", restarts=3),
        ),
    ],
)
def test_the_state_of_a_run(seen: Observed, expected: RunState) -> None:
    assert state_of(seen) == expected


@pytest.mark.parametrize(
    ("pods", "events", "reason"),
    [
        (
            [pod(0, "Pending", state={"waiting": {"reason": "ImagePullBackOff", "message": "back-off"}})],
            [],
            "node 0 (digits-0123abcd-0-aaaaa): ImagePullBackOff: back-off",
        ),
        (
            [
                pod(
                    1,
                    "Pending",
                    node=None,
                    conditions=[condition("PodScheduled", "Unschedulable", "0/2 nodes are available", "False")],
                )
            ],
            [],
            "node 1 (digits-0123abcd-1-aaaaa): Unschedulable: 0/2 nodes are available",
        ),
        (
            [],
            [
                event("FailedCreate", "old", "09:00"),
                event("FailedCreate", 'violates PodSecurity "restricted"', "10:00"),
            ],
            'digits-0123abcd: FailedCreate: violates PodSecurity "restricted"',
        ),
        (
            [pod(0, "Pending")],
            [event("FailedMount", 'secret "key" not found', kind="Pod", name="p")],
            'p: FailedMount: secret "key" not found',
        ),
        (
            [
                pod(
                    0,
                    "Pending",
                    initContainerStatuses=[{"name": "code", "state": {"waiting": {"reason": "PodInitializing"}}}],
                )
            ],
            [],
            None,
        ),
    ],
)
def test_why_a_run_does_not_start(pods: list[Object], events: list[Object], reason: str | None) -> None:
    assert state_of(Observed(job(), pods, events)).reason == reason


def test_a_failed_init_container_is_the_runs_failure() -> None:
    failed = pod(
        0,
        "Failed",
        state={},
        initContainerStatuses=[
            {"name": "code", "state": {"terminated": {"exitCode": 42, "message": "the archive is another one"}}}
        ],
    )
    state = state_of(Observed(run_object(status=LIMIT), [failed]))
    assert (state.exit_code, state.reason) == (42, "digits-0123abcd-0-aaaaa on rig-a: the archive is another one")
