"""A pod fills a claim with shards by the command that makes them here, and a run leaves a node that failed it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import Cli, WarmServer
from live import MAKE_SHARDS, Cluster, Live

from orchestrator.cluster.kubernetes.backend import KubernetesBackend

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
UNFIT = """
import json, os, sys
told = {"schema": 1, "attempt": 1, "node": 0, "rank": 0, "exit_code": 44, "error": "the disk is full"}
open(os.environ["TERMINATION_LOG"], "w").write(json.dumps(told))
sys.exit(44)
"""


@pytest.fixture
def cli(server: WarmServer, tmp_path: Path) -> Cli:
    return Cli(server, tmp_path, ())


@pytest.fixture
def there(space: Cluster) -> tuple[str, ...]:
    return tuple(text for text in space.overrides("job", "none") if text.startswith("cluster"))


def made(out: str) -> list[str]:
    return [out if word == "OUT" else word for word in MAKE_SHARDS]


def shards_of(text: str) -> list[tuple[str, int, str]]:
    """Name, samples and sha256 of each shard that `inspect` lists."""
    return [(Path(one["location"]).name, one["samples"], one["sha256"])
            for found in json.loads(text)["sets"] for one in found["shards"]]  # fmt: skip


def test_a_claim_gets_the_bytes_that_the_command_makes_here(
    cli: Cli, space: Cluster, there: tuple[str, ...], command: Callable[..., str]
) -> None:
    answer = cli("shards", "make", *made("/runs/packed"), "--follow", *there)
    assert answer.code == 0, answer.err
    assert "synthetic: /runs/packed" in answer.out
    (run_id,) = [facts["run_id"] for facts in cli("ls", *space.verbs, "--json").json() if "packed" in facts["run_id"]]
    job = Live(cli, space, run_id)
    assert job.facts()["state"] == "done"
    again = cli("shards", "make", *made("/runs/packed"), *there, "--json")
    assert (again.code, again.json()["outcome"]) == (0, "there"), again.err
    looking = command("looking", "-m", "orchestrator.cli.main", "shards", "inspect", "/runs/packed", "--json")
    seen = "\n".join(line.text for line in KubernetesBackend(space.api).logs(looking, True, None))
    assert cli("shards", "make", *made("here")).code == 0
    assert shards_of(seen[seen.index("{") :]) == shards_of(cli("shards", "inspect", "here", "--json").out) != []
    for one in (job, Live(cli, space, looking)):
        assert one.verb("rm").code == 0


def test_a_mistake_in_the_pod_is_this_command_s_exit_code_and_its_words_are_told(
    cli: Cli, space: Cluster, there: tuple[str, ...]
) -> None:
    answer = cli("shards", "make", "/runs/no-such-photos", "/runs/nothing", "--follow", *there)
    assert answer.code == 42
    assert "/runs/no-such-photos: no such file, folder or data set" in answer.out
    assert "no such file, folder or data set" in answer.err.splitlines()[-1]
    (run_id,) = [facts["run_id"] for facts in cli("ls", *space.verbs, "--json").json() if "nothing" in facts["run_id"]]
    assert Live(cli, space, run_id).verb("rm").code == 0


@pytest.fixture
def unfit(cli: Cli, space: Cluster, command: Callable[..., str]) -> Iterator[Live]:
    live = Live(cli, space, command("unfit", "-c", UNFIT))
    yield live
    if live.facts()["state"] in ("queued", "starting", "running"):
        live.verb("cancel", "--now")
    assert live.verb("rm").code == 0


def nodes_of(live: Live) -> set[str]:
    """Of the pods that have ended."""
    return {pod["spec"]["nodeName"] for pod in live.pods() if pod["status"]["phase"] == "Failed"}


def wait_for_an_end(live: Live) -> set[str]:
    until = time.monotonic() + 60
    while not (nodes := nodes_of(live)):
        assert time.monotonic() < until, live.pods()
        time.sleep(0.5)
    return nodes


def test_a_run_that_is_resumed_leaves_the_node_that_failed_it(unfit: Live) -> None:
    first = wait_for_an_end(unfit)
    assert unfit.verb("cancel").code == 0
    resumed = unfit.verb("resume")
    assert resumed.code == 0, resumed.err
    assert all(f"{node}" in resumed.err for node in first)
    assert wait_for_an_end(unfit).isdisjoint(first)


def test_packing_that_is_cancelled_ends_at_once_and_goes_on_where_it_was(
    cli: Cli, space: Cluster, there: tuple[str, ...]
) -> None:
    many = ("--samples", "30000", "--classes", "4", "--size", "32", "--samples-per-shard", "500", "--workers", "1")
    answer = cli("shards", "make", "synthetic", "/runs/many", *many, *there, "cluster.grace_s=120", "--json")
    assert answer.code == 0, answer.err
    job = Live(cli, space, answer.json()["run_id"])
    job.wait(lambda facts: "packing: " in job.verb("logs").out, "the first shards")
    began = time.monotonic()
    cancelled = job.verb("cancel")
    assert cancelled.code == 0, cancelled.err
    assert time.monotonic() - began < 60, "the pod heard the signal and did not wait for its grace period"
    assert job.facts()["state"] == "stopped"
    assert job.verb("resume").code == 0
    assert job.end()["exit_code"] == 0
    assert job.verb("rm").code == 0
