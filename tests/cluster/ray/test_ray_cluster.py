"""Real Ray clusters: the same bits as on this machine, whatever is stopped, killed or lost on the way."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launching import Cli, Run, wait_for
from ray_nodes import RayCluster, can_make_namespaces, one_node, two_nodes

from orchestrator.bundle import freeze
from orchestrator.cluster.code import archive_of
from orchestrator.cluster.job import job_of
from orchestrator.cluster.lines import last_words
from orchestrator.cluster.ray.api import connect
from orchestrator.cluster.ray.backend import RayBackend
from orchestrator.cluster.ray.submit import Submitted, submit
from orchestrator.compose import compose
from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]
END_S = 240.0
LONG = ("recipe.epochs=60", "recipe.ema_decay=0", "checkpointing.every_steps=5")


@dataclass
class Cluster:
    """A cluster and what a user does with it."""

    ray: RayCluster
    runs_dir: Path
    small: tuple[str, ...]

    def config(self, *overrides: str) -> Any:
        return compose([*self.small, *self.ray.overrides, f"runs_dir={self.runs_dir}", *overrides])

    def submit(self, *overrides: str) -> tuple[str, Submitted]:
        bundle = freeze(self.config(*overrides))
        archive = archive_of(bundle.config.cluster.code_files)
        spec = job_of(bundle, archive.digest)
        return bundle.run_id, submit(connect(bundle.config.cluster, {}), spec, archive.content)

    @property
    def backend(self) -> RayBackend:
        config: RunConfig = self.config().config
        return RayBackend(connect(config.cluster, {}))

    def wait(self, run_id: str, *states: str) -> dict[str, Any]:
        """The facts of a run once it is in one of these states."""

        def look() -> dict[str, Any] | None:
            facts = self.backend.status(run_id)
            return facts if facts["state"] in states else None

        try:
            return wait_for(look, f"{run_id} being {states}", END_S)
        except AssertionError as error:
            lines = "\n".join(str(line) for line in self.backend.logs(run_id, False, None))
            raise AssertionError(f"{error}: {self.backend.status(run_id)}\n{lines[-6000:]}") from None

    def result(self, run_id: str) -> dict[str, Any]:
        return read_json(self.runs_dir / run_id / "result.json")

    def steps(self, run_id: str) -> int:
        return self.backend.status(run_id)["step"] or 0

    def processes(self) -> dict[int, str]:
        """Command lines of the ranks."""
        found = {}
        for node in self.ray.nodes:
            for pid in node.pids():
                try:
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
                if " --rank " in command:
                    found[pid] = command
        return found


@pytest.fixture(scope="module")
def cluster(small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with one_node(cpus=3) as ray:
        yield Cluster(ray, tmp_path_factory.mktemp("ray_runs"), small)


@pytest.fixture(scope="module")
def long_run(session_cli: Cli, small: tuple[str, ...]) -> dict[str, Any]:
    """An undisturbed run on this machine, long enough to be disturbed elsewhere."""
    answer = session_cli("train", *small, *LONG, "--json")
    assert answer.code == 0, answer.err
    return answer.json()


def test_a_run_on_ray_ends_with_the_bits_of_the_local_one_and_another_seed_with_others(
    cluster: Cluster, trained: Run
) -> None:
    run_id, submitted = cluster.submit("recipe.ema_decay=0.9")
    assert submitted == Submitted(run_id, is_new=True)
    assert cluster.submit("recipe.ema_decay=0.9") == (run_id, Submitted(run_id, is_new=False))
    facts = cluster.wait(run_id, "done", "failed")
    result = cluster.result(run_id)
    same = ("run_id", "state", "step", "world_size", "weights_sha256", "state_sha256", "metrics", "data_digest")
    assert {key: result[key] for key in same} == {key: trained.result[key] for key in same}
    assert (facts["exit_code"], facts["attempt"], facts["step"]) == (0, 1, result["step"])
    lines = list(cluster.backend.logs(run_id, False, None))
    assert {(line.attempt, line.rank) for line in lines} >= {(1, 0), (1, 1)}
    other, _ = cluster.submit("recipe.ema_decay=0.9", "seed=1")
    cluster.wait(other, "done", "failed")
    assert cluster.result(other)["weights_sha256"] != result["weights_sha256"]


def test_a_token_that_is_missing_or_wrong_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("0" * 64)
    for file, rule in ((tmp_path / "wrong", "refuses the token"), (tmp_path / "none", "No such file")):
        with pytest.raises(ConfigError, match=rule):
            cluster.submit(f"cluster.token_file={file}")


def test_a_run_that_is_cancelled_and_resumed_ends_with_the_same_bits(
    cluster: Cluster, long_run: dict[str, Any]
) -> None:
    run_id, _ = cluster.submit(*LONG)
    wait_for(lambda: cluster.steps(run_id) > 3, "steps", END_S)
    cluster.backend.cancel(run_id, now=False)
    facts = cluster.wait(run_id, "stopped", "failed", "done")
    stopped = cluster.result(run_id)
    assert (facts["state"], facts["exit_code"], stopped["state"], stopped["exit_code"]) == (
        "stopped",
        45,
        "stopped",
        45,
    )
    cluster.backend.resume(run_id)
    stacks = wait_for(lambda: cluster.backend.stacks(run_id), "stacks", END_S)
    assert set(stacks) <= {0, 1}
    facts = cluster.wait(run_id, "done", "failed")
    result = cluster.result(run_id)
    assert (result["weights_sha256"], result["attempts"]) == (long_run["weights_sha256"], 2)


def test_a_rank_and_a_worker_that_are_killed_change_no_bit(cluster: Cluster, long_run: dict[str, Any]) -> None:
    run_id, _ = cluster.submit(*LONG, "seed=0", "name=killed", "data.name=synthetic")
    for attempt in (1, 2):
        wait_for(lambda a=attempt: cluster.backend.status(run_id)["attempt"] == a, f"attempt {attempt}", END_S)
        wait_for(lambda a=attempt: steps_of(cluster.runs_dir / run_id, a) >= 3, "steps", END_S)
        pid = max(cluster.processes())
        os.kill(pid if attempt == 1 else parent_of(pid), signal.SIGKILL)
    cluster.wait(run_id, "done", "failed")
    result = cluster.result(run_id)
    assert (result["state"], result["weights_sha256"]) == ("done", long_run["weights_sha256"])
    faults = [event for event in journal(cluster.runs_dir / run_id) if event["kind"] == "fault"]
    assert [(event["exit_code"], event["signal"]) for event in faults] == [(137, 9), (137, 9)]


def test_a_user_s_mistake_is_not_tried_again(cluster: Cluster) -> None:
    run_id, _ = cluster.submit("data.train=/nowhere/train", "name=mistake")
    facts = cluster.wait(run_id, "failed", "done")
    assert (facts["exit_code"], facts["attempt"]) == (42, 1)
    assert "data.train = /nowhere/train" in facts["error"] or "/nowhere/train" in facts["error"]
    assert not cluster.processes()


def test_where_kuberay_starts_failed_jobs_again_a_final_end_is_a_stopped_job(cluster: Cluster) -> None:
    run_id, submitted = cluster.submit(
        "data.train=/nowhere/train", "name=final", "cluster.env=['ORCHESTRATOR_KUBERAY=1']"
    )
    facts = cluster.wait(run_id, "failed", "stopped", "done")
    assert (facts["state"], facts["exit_code"]) == ("stopped", 42)
    words = last_words(connect(cluster.config().config.cluster, {}).logs(submitted.submission_id))
    assert words["exit_code"] == 42
    assert "/nowhere/train" in words["error"]


def test_a_run_that_cannot_start_says_what_it_waits_for_and_ends_at_once_when_cancelled(cluster: Cluster) -> None:
    run_id, _ = cluster.submit("name=waiting", "cluster.placement=STRICT_SPREAD")
    what = "waits for its workers: 2 x (1 CPU, 0.5 GiB memory), STRICT_SPREAD; the cluster has "
    assert next(line for line in cluster.backend.logs(run_id, True, None) if what in line.text)
    cluster.backend.cancel(run_id, now=False)
    facts = cluster.wait(run_id, "stopped", "failed", "done")
    assert (facts["state"], facts["exit_code"], facts["attempt"]) == ("stopped", 45, 0)


def test_a_run_is_followed_to_its_end_cancelled_without_a_save_pulled_and_removed(
    cluster: Cluster, tmp_path: Path
) -> None:
    run_id, _ = cluster.submit(*LONG, "name=followed")
    lines = cluster.backend.logs(run_id, True, None)
    seen = [next(lines)]
    wait_for(lambda: cluster.steps(run_id) > 3, "steps", END_S)
    cluster.backend.cancel(run_id, now=True)
    seen += lines
    assert {line.rank for line in seen} >= {0, 1}
    assert len({(line.attempt, line.rank, line.number) for line in seen}) == len(seen)
    assert cluster.wait(run_id, "stopped", "failed", "done")["state"] == "stopped"
    assert not [event for event in events(cluster.runs_dir / run_id) if event["kind"] == "stop"]
    assert (cluster.backend.pull(run_id, tmp_path) / "run.json").exists()
    cluster.backend.remove(run_id)
    assert run_id not in cluster.backend.ids()


@pytest.mark.skipif(not can_make_namespaces(), reason="two nodes need root and iproute2")
def test_two_nodes_train_together_and_one_that_is_lost_changes_no_bit(
    small: tuple[str, ...], long_run: dict[str, Any], tmp_path: Path
) -> None:
    with two_nodes(cpus=1) as ray:
        cluster = Cluster(ray, tmp_path / "runs", small)
        run_id, _ = cluster.submit(*LONG, "cluster.placement=STRICT_SPREAD", "cluster.cpus_per_process=0.5")
        folder = cluster.runs_dir / run_id
        wait_for(lambda: steps_of(folder, 1) >= 3, "steps", END_S)
        on_each = [sorted(set(node.pids()) & cluster.processes().keys()) for node in ray.nodes]
        assert [len(ranks) for ranks in on_each] == [1, 1]
        ray.nodes.pop().kill()
        wait_for(lambda: [event for event in journal(folder) if event["kind"] == "fault"], "the fault", END_S)
        ray.add()
        facts = cluster.wait(run_id, "done", "failed")
        result = cluster.result(run_id)
        assert (facts["state"], result["attempts"]) == ("done", 2)
        assert result["weights_sha256"] == long_run["weights_sha256"]


def journal(folder: Path) -> list[dict[str, Any]]:
    path = folder / "events" / "launcher.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events" / "rank_0.jsonl").read_text().splitlines()]


def steps_of(folder: Path, attempt: int) -> int:
    from orchestrator.cluster.watch import read_signs, steps_done

    return steps_done(read_signs(folder, attempt, range(2), 0.0))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
