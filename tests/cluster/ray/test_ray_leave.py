"""A pod of KubeRay's that is told to go lets its part of the run save, then ends Ray; with real processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_ray import FakeRay
from launching import wait_for

from orchestrator.cluster.ray import kuberay
from orchestrator.cluster.ray import leave as hook

STAND_IN = """
import signal, sys, time
told = open(TOLD, "a", buffering=1)
def take(number, frame):
    told.write(f"{NAME} {signal.Signals(number).name}\\n")
    time.sleep(0.3)
    told.write(f"{NAME} saved\\n")
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, take)
told.write(f"{NAME} listens\\n")
time.sleep(30)
"""
Start = Callable[..., None]


@pytest.fixture
def told(tmp_path: Path) -> Path:
    return tmp_path / "told"


@pytest.fixture
def start(tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start stand-ins with the command lines of a pod; the hook sees no other process of this machine."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").touch()
    name = "('rank' if '--rank' in sys.argv else 'ray' if 'start' in sys.argv else 'driver')"
    text = STAND_IN.replace("TOLD", repr(str(told))).replace("NAME", name)
    for path in ("jobs/ray_driver.py", "ray"):
        (tmp_path / path).write_text(text)
    shutil.copy("/bin/sleep", tmp_path / "raylet")
    started: list[subprocess.Popen[bytes]] = []

    def begin(*words: str) -> None:
        started.append(subprocess.Popen(words, cwd=tmp_path))

    every = hook._processes
    monkeypatch.setattr(hook, "_processes", lambda: [one for one in every() if one[0] in [p.pid for p in started]])
    monkeypatch.setattr(hook, "SETTLE_S", 0.2)
    yield begin
    for process in started:
        process.kill()
        process.wait()


def words_of(told: Path) -> list[str]:
    return told.read_text().splitlines() if told.exists() else []


def leave(told: Path, listeners: int) -> list[str]:
    """What the stand-ins tell, in order, when the hook returns and Ray has heard of it."""
    wait_for(lambda: len(words_of(told)) == listeners, "stand-ins", 10)
    began = time.monotonic()
    hook.leave("/etc/run.json")
    assert time.monotonic() - began >= 0.3
    words = wait_for(lambda: words_of(told) if "ray saved" in words_of(told) else None, "the end of Ray", 10)
    return words[listeners:]


def test_a_worker_drains_its_node_and_lets_its_ranks_save(start: Start, told: Path, tmp_path: Path) -> None:
    start(sys.executable, str(tmp_path / "ray"), "start", "--block")
    start(sys.executable, "-m", "jobs.ray_driver", "--rank", "/etc/run.json", "1", "0.0", "1")
    start(str(tmp_path / "raylet"), "30")
    words = leave(told, 2)
    assert sorted(words) == ["rank SIGTERM", "rank saved", "ray SIGTERM", "ray saved"]


def test_a_head_lets_the_driver_end_before_ray(start: Start, told: Path, tmp_path: Path) -> None:
    start(sys.executable, str(tmp_path / "ray"), "start", "--head", "--block")
    start(sys.executable, "-m", "jobs.ray_driver", "/etc/run.json")
    assert leave(told, 2) == ["driver SIGHUP", "driver saved", "ray SIGTERM", "ray saved"]


def test_a_rank_of_another_run_is_left_alone(start: Start, told: Path) -> None:
    start(sys.executable, "-m", "jobs.ray_driver", "--rank", "/etc/other.json", "1", "0.0", "1")
    wait_for(lambda: words_of(told), "a stand-in", 10)
    hook.leave("/etc/run.json")
    assert words_of(told) == ["rank listens"]


def test_a_driver_on_kuberay_has_its_own_job_stopped(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kuberay, "STOPPING_S", 0.0)
    ray.add("digits-x1", {})
    told = {"metadata": {"job_submission_id": "digits-x1"}}
    env = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(told), "RAY_AUTH_TOKEN": "secret-token"}
    kuberay.stop_own_job(ray.address.removeprefix("http://"), env)
    assert ray.jobs["digits-x1"]["status"] == "STOPPED"
    assert kuberay.starts_again({"ORCHESTRATOR_KUBERAY": "1"})
    assert not kuberay.starts_again({})
