"""Runs here and on Ray: causes out of what the run itself told, its last attempt before the earlier ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ended_runs import CONFIG, CUDA, DATA, PEER, WATCHDOG

from orchestrator.cli.main import main
from orchestrator.cluster.snapshot import Snapshot
from orchestrator.cluster.why.verdict import Answer, explain

RUN = "digits-0123abcd"
HUNG = "hung: no sign of life for 61.2 s in phase validation after step 40 (cluster.hang_validation_s = 60)"


def fault(attempt: int, error: str, code: int = 1, rank: int | None = 0) -> dict[str, Any]:
    return {"t": 100.0 + attempt, "attempt": attempt, "kind": "fault", "rank": rank, "exit_code": code, "error": error,
            "signal": None, "phase": "step", "step": 40, "by_itself": True, "detected_by": "exit"}  # fmt: skip


def answer(state: str, *, cluster: str = "local", objects: dict[str, Any] | None = None, **record: Any) -> Answer:
    facts = {"state": state, "attempt": 1, "step": 40, "total_steps": 1000, **record.pop("facts", {})}
    taken = Snapshot(
        "2026-01-01T10:00:00Z", cluster, "here", run_id=RUN, objects=objects or {}, record={"facts": facts, **record}
    )
    return explain(taken)


@pytest.mark.parametrize(
    ("error", "code", "cause", "words"),
    [
        (CONFIG, 42, "user-error", "recipe.global_batch_size=8"),
        (DATA, 42, "data", "orchestrator shards verify"),
        (CUDA, 43, "gpu-memory", "recipe.accumulate=2"),
        (HUNG, 1, "hang", "rank 1 was late"),
        ("killed by SIGKILL because memory ran out", 137, "out-of-memory", "cluster.memory_gib_per_process"),
        ("killed by SIGKILL", 137, "killed", "dmesg"),
        ("killed by SIGSEGV", 139, "crashed", "SIGSEGV"),
        ("RuntimeError: DataLoader worker is killed by signal: Bus error. It is possible that dataloader's workers are "
         "out of shared memory", 1, "shared-memory-full", "/dev/shm"),
        ("OSError: [Errno 28] No space left on device", 1, "disk-full", "runs_dir"),
        ("recipe.on_nan = stop: training diverged: the loss of rank 1 is not finite in step 2. Way out: look at it", 42,
         "not-finite", "look at it"),
        ("ModuleNotFoundError: No module named 'timmm'", 1, "import", "timmm"),
        ("s3://bucket/train-000000.tar: 403 Forbidden (AccessDenied)", 75, "data-unreachable", "cluster.store_secret"),
        ("DeviceError: cuda:0: GPU is lost", 44, "device-lost", "rank 1"),
        ("RuntimeError: NCCL error in: x.cpp:1, unhandled system error", 1, "network", "rank 1"),
        ("ValueError: whatever", 1, "crashed", "ValueError"),
    ],
)  # fmt: skip
def test_what_ended_a_run_here(error: str, code: int, cause: str, words: str) -> None:
    told = {"attempt": 1, "rank": 0, "kind": "RuntimeError", "error": PEER, "exit_code": 1, "t": 200.0}
    found = answer(
        "failed",
        faults=[fault(1, error, code, rank=1)],
        errors=[told],
        end={"exit_code": code, "error": error, "rank": 1},
    )
    assert found.causes[0].name == cause, found.causes
    assert words in found.causes[0].said + found.causes[0].way_out
    assert found.causes[0].evidence
    assert found.exit_code in (42, 75)


def test_the_class_of_an_error_counts_where_its_words_say_nothing() -> None:
    told = {
        "attempt": 1,
        "rank": 0,
        "kind": "CheckpointError",
        "error": "step 40 is of another model",
        "exit_code": 42,
        "t": 1.0,
    }
    assert answer("failed", errors=[told]).causes[0].name == "checkpoint"


def test_faults_of_earlier_attempts_are_over_once_the_run_gets_on() -> None:
    running = answer("running", faults=[fault(1, CUDA)], facts={"attempt": 2, "step": 412})
    assert (running.causes, running.said, running.exit_code) == ((), "step 412 of 1,000", 0)
    assert [cause.name for cause in running.earlier] == ["gpu-memory"]
    dead = answer("failed", faults=[fault(1, CUDA), fault(2, CONFIG, 42)], facts={"attempt": 2})
    assert [cause.name for cause in dead.causes] == ["user-error"]
    assert [cause.name for cause in dead.earlier] == ["gpu-memory"]


@pytest.mark.parametrize("state", ["done", "stopped", "running", "starting"])
def test_nothing_is_wrong_with_a_run_that_is_on_its_way_or_was_stopped(state: str) -> None:
    assert answer(state, end={"exit_code": 45 if state == "stopped" else 0}).causes == ()


def test_a_run_whose_launcher_is_gone_without_a_word() -> None:
    found = answer("dead")
    assert [cause.name for cause in found.causes] == ["launcher-killed"]
    assert f"orchestrator resume {RUN}" in found.causes[0].way_out


def test_the_rank_that_did_not_come_is_found_by_the_watchdogs_of_the_others() -> None:
    lines = [{"attempt": 1, "rank": rank, "lines": ["x", WATCHDOG.format(rank, 41)]} for rank in (0, 1, 3)]
    silent = answer("failed", lines=lines, facts={"world_size": 4})
    assert silent.causes[0].said.startswith(
        "rank 2 did not come: ranks 0, 1, 3 waited in ALLREDUCE number 41 for 600 s"
    )
    behind = [
        {"attempt": 1, "rank": rank, "lines": [WATCHDOG.format(rank, 40 if rank == 1 else 41)]} for rank in range(3)
    ]
    assert answer("failed", lines=behind, facts={"world_size": 3}).causes[0].said.startswith("rank 1 did not come")
    level = [{"attempt": 1, "rank": rank, "lines": [WATCHDOG.format(rank, 41)]} for rank in range(2)]
    assert answer("failed", lines=level, facts={"world_size": 2}).causes[0].said.startswith("a rank did not come")


def ray(state: str, status: str, message: str = "", **record: Any) -> Answer:
    job = {"submission_id": RUN, "status": status, "message": message}
    facts = {"step": None, "attempt": None, "world_size": None}
    return answer(state, cluster="ray", objects={"RayJobSubmission": [job]}, facts=facts, **record)


def test_workers_that_ray_has_no_room_for() -> None:
    line = "waits for its workers: 4 x (1 CPU, 1 GPU), any; the cluster has 2 of 8 CPU, 0 of 8 GPU free"
    found = ray("running", "RUNNING", lines=[{"attempt": 0, "rank": None, "lines": [line]}])
    assert [cause.name for cause in found.causes] == ["ray-workers-pending"]
    assert found.causes[0].said == (
        "Ray has no room for its workers: 4 x (1 CPU, 1 GPU), any; the cluster has 2 of 8 CPU, 0 of 8 GPU free"
    )
    assert found.exit_code == 75
    begun = answer(
        "running", cluster="ray", lines=[{"attempt": 0, "rank": None, "lines": [line]}], facts={"world_size": 4}
    )
    assert begun.causes == (), "they have come since"
    late = f"cluster.start_deadline_s = 60: no process has started within 60 s; it asked for {line[24:]}. Way out: less"
    ended = ray("failed", "FAILED", end={"exit_code": 75, "error": late})
    assert ended.causes[0].name == "ray-workers-pending"


def test_a_driver_that_ray_does_not_start() -> None:
    text = "Job has not started yet. It may be waiting for resources (CPUs, GPUs, memory, custom resources) to become "
    text += "available. It may be waiting for the runtime environment to be set up."
    assert [cause.name for cause in ray("queued", "PENDING", text).causes] == ["ray-driver-pending"]
    setting_up = "Job has not started yet. It may be waiting for the runtime environment to be set up."
    assert ray("queued", "PENDING", setting_up).causes == ()
    failed = "runtime_env setup failed: Failed to set up runtime environment. No module named pip"
    assert ray("failed", "FAILED", failed).causes[0].name == "ray-environment"


def test_why_reads_the_folder_of_a_run_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / RUN
    (folder / "events").mkdir(parents=True)
    (folder / "logs" / "attempt_1").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run_id": RUN, "name": "digits", "config": {}}))
    (folder / "events" / "launcher.jsonl").write_text(json.dumps(fault(1, CONFIG, 42)) + "\n")
    result = {"run_id": RUN, "state": "failed", "exit_code": 42, "rank": 0, "error": CONFIG, "step": 0}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "logs" / "attempt_1" / "rank_0.log").write_text("one\ntwo\n")
    assert main(["why", "digits", "--runs-dir", str(tmp_path / "runs")]) == 42
    out = capsys.readouterr().out
    assert "1. user-error: rank 0: recipe.global_batch_size = 7" in out
    assert "way out: recipe.global_batch_size=8" in out
    assert main(["snapshot", RUN, "--runs-dir", str(tmp_path / "runs")]) == 0
    taken = json.loads(capsys.readouterr().out)
    assert taken["record"]["lines"] == [{"attempt": 1, "rank": 0, "lines": ["one", "two"]}]
    assert taken["objects"]["Machine"][0]["disk"]["free"] > 0
    assert main(["why", RUN, "--runs-dir", f"file://{tmp_path}/runs"]) == 42, "of a store, as far as its folder tells"
    assert "1. user-error: rank 0" in capsys.readouterr().out
