"""The submitter's role is enough and nothing in it is too much: without each right a command says which it lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from administrator import CLUSTER_BINDING, CLUSTER_ROLE, Right, Rights, load, rights_of, standing
from launching import Answer, Cli, WarmServer, wait_for
from live import TRAIN, Cluster

from orchestrator.cluster.kubernetes.pods import is_running
from orchestrator.cluster.kubernetes.resources import (
    CONFIG_MAP,
    KINDS,
    NETWORK_POLICY,
    QUEUE,
    RUN,
    SENT,
    SERVICE,
    TRAINING_RUNTIME,
    WORKLOAD,
    Resource,
    resource_of,
)  # fmt: skip
from orchestrator.cluster.kubernetes.runs import pods_of
from orchestrator.options import JobKind

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
NOWHERE = f"127.0.0.1:5/none@sha256:{'0' * 64}"
"""An image that cannot be pulled: a run's pods stay, and nothing of them runs."""
SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("[a1 r0 #1] awake", flush=True)
time.sleep(3600)
"""
PARTS = {one.plural: one for one in (CONFIG_MAP, SERVICE, NETWORK_POLICY, TRAINING_RUNTIME)}
RUNS = {resource.plural: kind for kind, resource in KINDS.items()}
RIGHTS = rights_of("base/submitter_role.yaml")


@dataclass
class World:
    """Commands of the submitter, and runs to try them on, each made when it is first asked for."""

    cli: Cli
    cluster: Cluster
    command: Callable[..., str]
    known: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def train(self, kind: JobKind, name: str, *more: str) -> Answer:
        """Of one process, whose pod never starts."""
        own = ("compute.num_nodes=1", "compute.num_processes=1", f"name={name}", f"cluster.image={NOWHERE}")
        return self.cli("train", *TRAIN, *self.cluster.overrides(kind.name, name), *own, *more, "--json")

    def verb(self, name: str, run_id: str, *words: str) -> Answer:
        return self.cli(name, run_id, *self.cluster.verbs, *words)

    def name(self) -> str:
        """One that no run has had."""
        self.count += 1
        return f"rights-{self.count:02}"

    def parked(self, kind: JobKind) -> str:
        """A run of this kind that is stopped."""
        if kind.name not in self.known:
            if not self.cluster.api.serves(KINDS[kind]):
                pytest.skip(f"NOT SERVED: the cluster knows no {kind.name}")
            run_id = succeeded(self.train(kind, f"parked-{kind.name}")).json()["run_id"]
            succeeded(self.verb("cancel", run_id, "--now"))
            self.known[kind.name] = run_id
        return self.known[kind.name]

    def sleeper(self) -> str:
        """A run whose one pod runs and says one line."""
        if "sleeper" not in self.known:
            self.known["sleeper"] = self.command("sleeper", "-c", SLEEPER)
        run_id = self.known["sleeper"]

        def awake() -> bool:
            if self.state(run_id) == "stopped":
                succeeded(self.verb("resume", run_id))
            return any(map(is_running, pods_of(self.cluster.api, run_id)))

        wait_for(awake, "the sleeper", 60)
        return run_id

    def state(self, run_id: str) -> str:
        return succeeded(self.verb("status", run_id, "--json")).json()["state"]

    def left_of(self, name: str) -> list[str]:
        """Objects of a run with this name."""
        found = [(resource, obj) for resource in SENT.values() if self.cluster.api.serves(resource)
                 for obj in self.cluster.api.list(resource)[0]]  # fmt: skip
        return [f"{resource.kind} {obj['metadata']['name']}" for resource, obj in found
                if f"{name}-" in obj["metadata"]["name"]]  # fmt: skip

    @contextmanager
    def removed(self, answer: Answer) -> Iterator[str]:
        """A run that was sent in spite of a missing right, and is not needed."""
        run_id = succeeded(answer).json()["run_id"]
        yield run_id
        succeeded(self.verb("cancel", run_id, "--now"))
        succeeded(self.verb("rm", run_id))


def succeeded(answer: Answer) -> Answer:
    assert answer.code == 0, answer.err
    return answer


def lacks(answer: Answer, right: Right) -> None:
    """The command failed as a user's mistake, and names the right and the way out."""
    assert answer.code == 42, (answer.out, answer.err)
    assert f"no right to {right} in it. Way out: another namespace, or let its operator apply k8s/base" in answer.err
    assert "Traceback" not in answer.err


@pytest.fixture(scope="module")
def world(
    space: Cluster, server: WarmServer, command: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    world = World(Cli(server, tmp_path_factory.mktemp("rights"), ()), space, command)
    yield world
    for run_id in world.known.values():
        if world.state(run_id) != "stopped":
            succeeded(world.verb("cancel", run_id, "--now"))
        succeeded(world.verb("rm", run_id))


@pytest.fixture
def rights(space: Cluster) -> Rights:
    return Rights(space.api)


# What each right is for: called with the world and the right, which it takes away for the length of one command.

Need = Callable[[World, Rights, Right], None]


def sends_nothing(kind: JobKind, *more: str) -> Need:
    """A run that cannot be made whole is not there at all."""

    def check(world: World, rights: Rights, right: Right) -> None:
        name = world.name()
        with rights.without(right):
            answer = world.train(kind, name, *more)
        lacks(answer, right)
        assert world.left_of(name) == []

    return check


def meets_a_leftover(plural: str) -> Need:
    """What another life of the run left behind is looked at and replaced."""
    kind = JobKind.trainjob if plural == TRAINING_RUNTIME.plural else JobKind.job

    def check(world: World, rights: Rights, right: Right) -> None:
        name = world.name()
        objects = succeeded(world.train(kind, name, "--dry-run")).json()["objects"]
        (left,) = [obj for obj in objects if resource_of(obj).plural == plural and RUN in obj["metadata"]["labels"]]
        with standing(world.cluster.api, [(PARTS[plural], left)]):
            with rights.without(right):
                answer = world.train(kind, name)
            lacks(answer, right)
            assert world.left_of(name) == [f"{left['kind']} {left['metadata']['name']}"]
            with world.removed(world.train(kind, name)):
                pass

    return check


def stays_parked(kind: JobKind, *words: str) -> Need:
    """A command on a stopped run that changes nothing."""

    def check(world: World, rights: Rights, right: Right) -> None:
        run_id = world.parked(kind)
        with rights.without(right):
            answer = world.verb(words[0], run_id, *words[1:])
        lacks(answer, right)
        assert world.state(run_id) == "stopped"

    return check


def is_not_hidden(kind: JobKind) -> Need:
    """A kind that may not be listed is told of, in a list and where a run is looked for."""

    def check(world: World, rights: Rights, right: Right) -> None:
        run_id = world.parked(kind)
        with rights.without(right):
            listed, asked = world.cli("ls", *world.cluster.verbs), world.verb("status", run_id)
        assert (listed.code, asked.code) == (0, 42)
        assert run_id not in listed.out
        for answer in (listed, asked):
            assert f"runs that are {right.resource} are not shown: no right to {right} in" in answer.err
        assert run_id in world.cli("ls", *world.cluster.verbs).out

    return check


def asks_the_sleeper(*words: str) -> Need:
    def check(world: World, rights: Rights, right: Right) -> None:
        run_id = world.sleeper()
        with rights.without(right):
            answer = world.verb(words[0], run_id, *words[1:])
        lacks(answer, right)

    return check


def tells_why_no_pod_is_made(world: World, rights: Rights, right: Right) -> None:
    answer = world.train(JobKind.job, world.name(), "cluster.service_account=nobody")
    assert "cluster.service_account = nobody: not checked: no right to get serviceaccounts" in answer.err
    with world.removed(answer) as run_id:

        def reason() -> str:
            return succeeded(world.verb("status", run_id, "--json")).json()["reason"] or ""

        wait_for(lambda: "FailedCreate" in (told := reason()) and "nobody" in told, "the reason", 30)
        with rights.without(right):
            assert reason() == f"not checked: no right to {right}"


NO_CLAIM = "cluster.volumes=[{claim: nothing, path: /runs, read_only: false}]"


def checks(key: str, override: str) -> Need:
    """What the config names is looked at before anything is sent."""

    def check(world: World, rights: Rights, right: Right) -> None:
        wrong = f"{key} = nothing: namespace {world.cluster.api.namespace} has no such"
        answer = world.train(JobKind.job, world.name(), override)
        assert answer.code == 42
        assert wrong in answer.err
        assert f"no right to {right}" not in answer.err
        with rights.without(right):
            answer = world.train(JobKind.job, world.name(), override)
            if right.verb == "list":
                assert wrong in answer.err
                assert f"(which there are is not told: no right to {right})" in answer.err
                return
        assert f"{key} = nothing: not checked: no right to {right}" in answer.err
        with world.removed(answer):
            pass

    return check


def stops_at_the_queue(world: World, rights: Rights, right: Right) -> None:
    api, name = world.cluster.api, world.name()
    queue = {"metadata": {"name": name}, "spec": {"clusterQueue": "nothing"}}
    with (
        standing(api, [(QUEUE, queue)]),
        world.removed(world.train(JobKind.job, name, f"cluster.queue={name}")) as run_id,
    ):
        wait_for(lambda: any(f"-{run_id}-" in one["metadata"]["name"] for one in api.list(WORKLOAD)[0]), "Kueue", 30)
        with rights.without(right):
            answer = world.verb("cancel", run_id)
        lacks(answer, right)
        assert world.state(run_id) == "queued"


NEEDS: dict[str, Need] = {
    **{f"create {plural}": sends_nothing(kind) for plural, kind in RUNS.items()},
    **{f"get {plural}": stays_parked(kind, "status") for plural, kind in RUNS.items()},
    **{f"list {plural}": is_not_hidden(kind) for plural, kind in RUNS.items()},
    **{f"patch {plural}": stays_parked(kind, "resume") for plural, kind in RUNS.items()},
    **{f"delete {plural}": stays_parked(kind, "rm") for plural, kind in RUNS.items()},
    **{f"create {plural}": sends_nothing(JobKind.job) for plural in PARTS},
    **{f"{verb} {plural}": meets_a_leftover(plural) for plural in PARTS for verb in ("get", "delete")},
    f"create {TRAINING_RUNTIME.plural}": sends_nothing(JobKind.trainjob),
    "list pods": asks_the_sleeper("status"),
    "get pods": asks_the_sleeper("logs", "-f"),
    "watch pods": asks_the_sleeper("logs", "-f"),
    "get pods/log": asks_the_sleeper("logs"),
    "patch pods": asks_the_sleeper("stack"),
    "delete pods": asks_the_sleeper("cancel", "--now"),
    "list events": tells_why_no_pod_is_made,
    "get persistentvolumeclaims": checks("cluster.volumes", NO_CLAIM),
    "list persistentvolumeclaims": checks("cluster.volumes", NO_CLAIM),
    "get localqueues": checks("cluster.queue", "cluster.queue=nothing"),
    "list localqueues": checks("cluster.queue", "cluster.queue=nothing"),
    "list workloads": stops_at_the_queue,
    "patch workloads": stops_at_the_queue,
}  # fmt: skip


@pytest.mark.parametrize("right", RIGHTS, ids=str)
def test_without_a_right_a_command_says_which_one_it_lacks(world: World, rights: Rights, right: Right) -> None:
    """A right of the role that stands not in the table is one that nothing needs."""
    if right.group and not any(world.cluster.api.serves(one) for one in served_in(right)):
        pytest.skip(f"NOT SERVED: the cluster has no {right.resource} of {right.group}")
    NEEDS[str(right)](world, rights, right)


def served_in(right: Right) -> list[Resource]:
    known = (*KINDS.values(), *PARTS.values(), QUEUE, WORKLOAD)
    return [one for one in known if (one.group, one.plural) == (right.group, right.resource)]


def test_no_right_is_tried_that_the_role_does_not_give() -> None:
    assert set(NEEDS) == {str(right) for right in RIGHTS}


READER = {
    "workloadpriorityclasses": "WorkloadPriorityClass",
    "priorityclasses": "PriorityClass",
}


@pytest.mark.parametrize("plural", READER)
def test_what_the_optional_reader_may_read_is_checked_and_else_said_not_to_be(world: World, plural: str) -> None:
    api, name = world.cluster.api, world.name()
    wanted = "cluster.priority=nothing"
    queue = {"metadata": {"name": name}, "spec": {"clusterQueue": "nothing"}}
    queues = [(QUEUE, queue)] if plural == "workloadpriorityclasses" else []
    words = (wanted, *(f"cluster.queue={name}" for _ in queues))
    with standing(api, queues):
        answer = world.train(JobKind.job, name, *words)
        assert f"cluster.priority = nothing: not checked: no right to get {plural}" in answer.err
        with world.removed(answer):
            pass
        with standing(api, reader_of(api.namespace)):
            answer = wait_for(lambda: refused(world.train(JobKind.job, name, *words)), "the reader's rights", 30)
    assert f"cluster.priority = nothing: the cluster has no such {READER[plural]}" in answer.err


def refused(answer: Answer) -> Answer | None:
    return answer if answer.code == 42 else None


def reader_of(namespace: str) -> list[tuple[Resource, dict[str, Any]]]:
    """k8s/reader for the submitter of a namespace, under a name of its own."""
    role, binding = load("reader/cluster_role.yaml"), load("reader/cluster_role_binding.yaml")
    for obj in (role, binding):
        obj["metadata"]["name"] = namespace
    binding["roleRef"]["name"] = namespace
    binding["subjects"][0]["namespace"] = namespace
    return [(CLUSTER_ROLE, role), (CLUSTER_BINDING, binding)]
