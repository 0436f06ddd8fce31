"""Runs on two nodes without a shared disk: the record lives in a store, and each life of a node begins with nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from launching import Run, wait_for
from warm_nodes import Launcher, WarmNodes

from orchestrator.bundle import freeze, write_bundle
from orchestrator.compose import compose
from orchestrator.train.bucket import Bucket

sys.path += [str(Path(__file__).parents[1] / room) for room in ("data", "train")]
from test_mirror import server, store  # noqa: F401
from test_s3 import KEY, SECRET, Server, weed

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]
needs_weed = pytest.mark.skipif(weed is None, reason="no SeaweedFS (`weed`) in this environment")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmNodes]:
    nodes = WarmNodes(tmp_path_factory.mktemp("warm_nodes"))
    yield nodes
    nodes.close()


@dataclass
class Apart:
    """A run whose nodes share nothing but a store."""

    nodes: WarmNodes
    url: str
    """Of the folder of runs."""
    scratch: Path
    path: Path
    """Of run.json as the pods have it."""
    run_id: str
    env: dict[str, str]

    def start(self, entry: str = "jobs.train:rank", **more: Any) -> list[Launcher]:
        """A life of both nodes, on machines that have nothing."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        return self.nodes.start(self.path, entry=entry, ORCHESTRATOR_CACHE=str(self.scratch), **self.env, **more)

    def text(self, key: str) -> str:
        """What the store has under a key of the run; empty where there is nothing."""
        bucket = Bucket(f"{self.url}/{self.run_id}")
        try:
            found = bucket.get(key)
            return found[0].decode() if found else ""
        finally:
            bucket.close()

    def keys(self) -> list[str]:
        bucket = Bucket(f"{self.url}/{self.run_id}")
        try:
            return bucket.names()
        finally:
            bucket.close()

    def contents(self) -> dict[str, str]:
        """What marks each object of the run."""
        bucket = Bucket(f"{self.url}/{self.run_id}")
        try:
            return {key: mark for key, (_, mark) in bucket.entries().items()}
        finally:
            bucket.close()

    def saved(self) -> list[str]:
        return sorted({key.split("/")[1] for key in self.keys() if key.startswith("checkpoints/step_")})

    def events(self, source: int | str) -> list[dict[str, Any]]:
        name = source if isinstance(source, str) else f"rank_{source}"
        return [json.loads(line) for line in self.text(f"events/{name}.jsonl").splitlines()]

    def result(self) -> dict[str, Any]:
        return json.loads(self.text("result.json"))


def apart(nodes: WarmNodes, place: Path, url: str, *overrides: str) -> Apart:
    more = ("compute.num_nodes=2", "cluster.hang_start_s=60", "cluster.canary=false", "cluster.grace_s=20")
    bundle = freeze(compose([*overrides, *more, "recipe.ema_decay=0.9", f"runs_dir={url}"]))
    bundle = replace(bundle, code_digest=nodes.code_digest)
    path = place / "run.json"
    write_bundle(bundle, path, {})
    return Apart(nodes, url, place / "scratch", path, bundle.run_id, {})


@pytest.fixture
def in_files(nodes: WarmNodes, tmp_path: Path, small: tuple[str, ...]) -> Iterator[Apart]:
    yield apart(nodes, tmp_path, f"file://{tmp_path}/store", *small, "checkpointing.every_steps=3")
    nodes.end_all()


@pytest.fixture
def in_s3(nodes: WarmNodes, store: str, server: Server, tmp_path: Path, small: tuple[str, ...]) -> Iterator[Apart]:  # noqa: F811
    found = apart(nodes, tmp_path, store, *small, "checkpointing.every_steps=3")
    found.env = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    yield found
    nodes.end_all()


@pytest.fixture(params=["in_files", pytest.param("in_s3", marks=needs_weed)])
def run(request: pytest.FixtureRequest) -> Apart:
    return request.getfixturevalue(request.param)


def codes(launchers: list[Launcher]) -> list[int]:
    return [launcher.wait(90) for launcher in launchers]


def require_same_end(run: Apart, trained: Run, attempts: int) -> None:
    result = run.result()
    for key in ("run_id", "state", "step", "weights_sha256", "state_sha256", "metrics", "world_size"):
        assert result[key] == trained.result[key], key
    assert result["attempts"] == attempts
    assert {"report.html", "evaluation.json", "events/rank_0.jsonl", "events/rank_1.jsonl"} <= set(run.keys())


def test_a_killed_node_and_empty_machines_change_no_bit(run: Apart, trained: Run) -> None:
    first = run.start()
    wait_for(run.saved, f"a checkpoint in the store:\n{first[0].out}", 60)
    first[1].send(signal.SIGKILL)
    assert codes(first) == [75, -9], first[0].out
    second = run.start()
    assert codes(second) == [0, 0], second[0].out + second[1].out
    require_same_end(run, trained, attempts=2)
    events = [event for event in run.events("launcher") if event["kind"] in ("launch", "end")]
    assert [(event["kind"], event["attempt"]) for event in events] == [
        ("launch", 1), ("end", 1), ("launch", 2), ("end", 2),
    ]  # fmt: skip
    assert "resuming at step" in run.text("logs/attempt_2/rank_0.log")
    assert all(run.text(f"logs/attempt_{attempt}/rank_0.log") for attempt in (1, 2))
    told = [{event["attempt"] for event in run.events(rank)} for rank in (0, 1)]
    assert told[0] == {1, 2}
    assert 2 in told[1], "a node that is killed takes its last seconds with it"
    (late,) = run.start(only=1)
    assert late.wait() == 0
    assert "is already finished" in late.out


def test_a_stop_is_told_by_the_record_and_the_run_goes_on_elsewhere(in_files: Apart, trained: Run) -> None:
    run = in_files
    first = run.start()
    wait_for(run.saved, f"a checkpoint in the store:\n{first[0].out}", 60)
    first[1].send(signal.SIGTERM)
    assert codes(first) == [143, 143], first[0].out
    stopped = run.result()
    assert (stopped["state"], stopped["exit_code"]) == ("stopped", 143)
    assert run.saved()[-1].startswith(f"step_{stopped['step']:08d}.g0001")
    second = run.start()
    assert codes(second) == [0, 0], second[0].out
    require_same_end(run, trained, attempts=2)
    assert f"resuming at step {stopped['step']}" in run.text("logs/attempt_2/rank_0.log")


def test_three_failures_at_one_step_are_counted_over_machines_that_are_new_each_time(in_files: Apart) -> None:
    for expected in ([75, 1], [75, 1], [43, 43]):
        launchers = in_files.start(entry="stand_in:doomed")
        assert codes(launchers) == expected, launchers[0].out
    assert "3 attempts without getting beyond step 6" in launchers[0].last_words()["error"]
    assert in_files.result()["exit_code"] == 43
    assert all(in_files.text(f"logs/attempt_{life}/rank_1.log") for life in (1, 2, 3))


@needs_weed  # a folder has no conditional puts
def test_an_older_start_that_is_still_alive_changes_nothing_and_ends(in_s3: Apart, trained: Run) -> None:
    run = in_s3
    old = run.start()
    wait_for(run.saved, f"a checkpoint in the store:\n{old[0].out}", 60)
    for launcher in old:
        os.killpg(launcher.pid, signal.SIGSTOP)
    run.scratch = run.scratch.with_name("elsewhere")
    new = run.start()
    assert codes(new) == [0, 0], new[0].out
    require_same_end(run, trained, attempts=2)
    before = run.contents()
    for launcher in old:
        os.killpg(launcher.pid, signal.SIGCONT)
    assert all(code not in (0, None) for code in codes(old)), old[0].out
    after = run.contents()
    assert {key: after[key] for key in before} == before
    left = after.keys() - before.keys()  # what an upload was amid when it was stopped, which the next start removes
    assert all(".g0001/" in key and not key.endswith("manifest.json") for key in left), left


@needs_weed
def test_a_store_that_dies_on_the_way_costs_a_warning(in_s3: Apart, server: Server, trained: Run) -> None:  # noqa: F811
    launchers = in_s3.start()
    wait_for(in_s3.saved, f"a checkpoint in the store:\n{launchers[0].out}", 60)
    server.stop()
    back = threading.Timer(6, server.start)
    back.start()
    assert codes(launchers) == [0, 0], launchers[0].out
    back.join()
    assert "tried again" in launchers[0].out + launchers[1].out or "is sent again" in launchers[0].out
    require_same_end(in_s3, trained, attempts=1)
