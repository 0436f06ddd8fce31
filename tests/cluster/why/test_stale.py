"""What is over does not count: old warnings beside newer successes, earlier attempts beside one that gets on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ended_runs import out_of_memory, preempted_by_the_scheduler
from queued_runs import preempted_in_the_queue
from scenes import RUN, World, condition, ended, event, failed, healthy, meta, pod, queued, waiting, without_pods
from test_why import answer

BEFORE, AFTER = "2026-01-01T10:00:02Z", "2026-01-01T10:09:00Z"


def scheduling(world: World, at: str) -> None:
    text = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    world.add("Event", event(world.pods[0], "FailedScheduling", text, at))


def mount(world: World, at: str) -> None:
    text = 'MountVolume.SetUp failed for volume "secret-tracking" : secret "wandb" not found'
    world.add("Event", event(world.pods[0], "FailedMount", text, at))


def creation(world: World, at: str) -> None:
    text = f'Error creating: pods "{RUN}-0-" is forbidden: exceeded quota: team, requested: pods=1, used: pods=2, '
    text += "limited: pods=2"
    world.add("Event", event(world.run, "FailedCreate", text, at))


def pull(world: World, at: str) -> None:
    world.add("Event", event(world.pods[0], "Failed", "Failed to pull image: dial tcp: connection refused", at))


def binding(world: World, at: str) -> None:
    about = {"kind": "PersistentVolumeClaim", **world.objects["PersistentVolumeClaim"][0]}
    world.add("Event", event(about, "ProvisioningFailed", "out of space", at))


def node(world: World, at: str) -> None:
    world.add("Event", event(world.pods[0], "NodeNotReady", "Node is not ready", at))


def queue(world: World, at: str) -> None:
    """It waited once; the queue has let it in."""
    world.run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpus"
    own = world.add("Workload", {"metadata": meta("job-x", world.run), "spec": {"active": True}})
    own["status"] = {"conditions": [
        condition("QuotaReserved", "True", "QuotaReserved"), condition("Admitted", "True", "Admitted"),
        condition("Evicted", "False", "QuotaReserved", "Previously: Preempted to accommodate a workload (UID: 1)"),
        condition("Preempted", "False", "QuotaReserved", "Previously: Preempted to accommodate a workload (UID: 1)"),
    ]}  # fmt: skip
    world.add("Event", event(own, "Pending", "couldn't assign flavors to pod set main: insufficient unused quota", at))


@pytest.mark.parametrize("change", [scheduling, mount, creation, pull, binding, node, queue])
@pytest.mark.parametrize("at", [BEFORE, AFTER])
def test_a_warning_does_not_count_once_the_run_gets_on(change: Callable[[World, str], None], at: str) -> None:
    found = answer(lambda world: change(world, at))
    assert (found.causes, found.said, found.exit_code) == ((), "step 412 of 1,000", 0)


def test_a_mount_that_failed_before_the_newest_pod_was_made_does_not_count_and_a_later_one_does() -> None:
    def change(world: World, at: str) -> None:
        for one in world.pods:
            waiting(one, "ContainerCreating")
        mount(world, at)
        world.pods[0]["metadata"]["creationTimestamp"] = "2026-01-01T10:05:00Z"

    assert [cause.name for cause in answer(lambda world: change(world, BEFORE)).causes] == ["unknown"]
    assert [cause.name for cause in answer(lambda world: change(world, AFTER)).causes] == ["secret-missing"]


def test_a_refusal_does_not_count_once_the_pods_are_there_that_it_was_about() -> None:
    def change(world: World, at: str) -> None:
        for one in world.pods:
            waiting(one, "ContainerCreating")
        creation(world, at)

    both = answer(lambda world: change(world, AFTER))
    assert [cause.name for cause in both.causes] == ["unknown"], "both pods are there"

    def lacks_one(world: World) -> None:
        change(world, AFTER)
        world.objects["Pod"].remove(world.pods[1])

    assert [cause.name for cause in answer(lacks_one).causes] == ["quota-exceeded"]


def test_what_an_earlier_attempt_met_is_told_apart_from_what_holds_now() -> None:
    def change(world: World) -> None:
        facts = world.record
        first = pod(0, "node-a", suffix="older")
        ended(first, 137, reason="OOMKilled")
        world.add("Pod", first)
        world.record = facts

    found = answer(change)
    assert (found.causes, found.exit_code) == ((), 0)
    assert [cause.name for cause in found.earlier] == ["out-of-memory"]
    assert answer(out_of_memory).causes[0].name == "out-of-memory", "the control"


def test_a_run_that_was_preempted_and_runs_again_is_fine() -> None:
    def change(world: World) -> None:
        text = "Preempted by pod 0a1b2c3d-0000-4444-8888-aaaaaaaaaaaa on node node-a"
        gone = {"kind": "Pod", "metadata": {"name": f"{RUN}-0-older", "uid": "gone"}}
        world.add("Event", event(gone, "Preempted", text, BEFORE, kind="Normal"))

    found = answer(change)
    assert (found.causes, [cause.name for cause in found.earlier]) == ((), ["preempted"])
    for control in (preempted_by_the_scheduler, preempted_in_the_queue):
        assert answer(control).causes[0].name == "preempted"


def test_a_run_that_is_done_has_nothing_wrong_whatever_its_pods_met() -> None:
    def change(world: World) -> None:
        out_of_memory(world)
        world.run["status"] = {"succeeded": 2, "conditions": [condition("Complete", "True", "CompletionsReached")]}
        world.record = {"facts": {"state": "done", "step": 1000, "total_steps": 1000}}

    found = answer(change)
    assert (found.causes, found.said, found.exit_code) == ((), "done, step 1,000 of 1,000", 0)


def test_a_run_that_somebody_stopped_is_not_stuck() -> None:
    def cancelled(world: World) -> None:
        without_pods(world)
        world.run["spec"]["suspend"] = True

    def cancelled_in_a_queue(world: World) -> None:
        queued(world, "couldn't assign flavors to pod set main: insufficient unused quota")
        world.run["metadata"]["annotations"]["orchestrator/stopped"] = "2026-01-01T10:01:00+00:00"

    def stopped_itself(world: World) -> None:
        for one in world.pods:
            ended(one, 45, None, rank=None)
        failed(
            world,
            "PodFailurePolicy",
            "Container node for pod x failed with exit code 45 matching FailJob rule at index 0",
        )

    for change in (cancelled, cancelled_in_a_queue, stopped_itself):
        found = answer(change)
        assert (found.causes, found.state, found.exit_code) == ((), "stopped", 0), change.__name__
        assert "resume" in found.said


def test_a_run_that_has_just_been_sent_is_starting_and_one_that_starts_for_ever_is_asked_about() -> None:
    def fresh(world: World) -> None:
        for one in world.pods:
            one["status"] = {"phase": "Pending", "conditions": []}
        world.run["metadata"]["creationTimestamp"] = "2026-01-01T10:09:50Z"
        world.record = {}

    found = answer(fresh)
    assert (found.causes, found.said) == ((), "starting: 0 of 2 pods run")

    def old(world: World) -> None:
        fresh(world)
        world.run["metadata"]["creationTimestamp"] = "2026-01-01T09:00:00Z"

    assert [cause.name for cause in answer(old).causes] == ["unknown"]


def test_a_node_that_is_ill_counts_only_under_a_pod_of_the_run() -> None:
    def change(world: World) -> None:
        other = healthy().objects["Node"][0]
        other["metadata"] = {"name": "node-c", "labels": {}}
        other["status"]["conditions"] = [condition("Ready", "Unknown", "NodeStatusUnknown")]
        world.add("Node", other)

    assert answer(change).causes == ()
