"""`shards make` in a pod: what is typed is shown, sent and followed, and makes the bytes that it makes here."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_api import FakeApi
from launching import REPO
from objects import condition
from profiles import CODE

from orchestrator import bundle
from orchestrator.cli.main import main
from orchestrator.cluster.kubernetes import lifecycle, submit

BATCH, CORE = "/apis/batch/v1", "/api/v1"
IMAGE = f"registry.example/train@sha256:{'1' * 64}"
SMALL = ("--samples", "60", "--classes", "3", "--size", "8", "--samples-per-shard", "25", "--val-fraction", "0.2")
Said = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "PAUSE_S", 0.01)
    monkeypatch.setattr(lifecycle, "POLL_S", 0.01)
    monkeypatch.setattr(bundle, "imported_code", lambda: CODE)  # whoever edits the checkout meanwhile


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Said:
    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return (main([str(word) for word in words]), *capsys.readouterr())

    return run


@pytest.fixture
def claim(server: FakeApi, tmp_path: Path) -> Path:
    """Where the pods mount it, which is a folder of this machine, so that what they run can run here."""
    for name in ("data", "source"):
        server.put(
            CORE, "persistentvolumeclaims", {"metadata": {"name": name}, "spec": {"accessModes": ["ReadWriteOnce"]}}
        )
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def cluster(claim: Path) -> tuple[str, ...]:
    volumes = f"[{{claim: data, path: {claim}, read_only: false}}, {{claim: source, path: /source, read_only: true}}]"
    return ("cluster=kubernetes", f"cluster.image={IMAGE}", f"cluster.python={sys.executable}", "cluster.code=image",
            f"cluster.volumes={volumes}")  # fmt: skip


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def job_in(text: str) -> dict[str, Any]:
    return next(obj for obj in yaml.safe_load_all(text) if obj["kind"] == "Job")


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")}  # fmt: skip


def test_the_pod_s_command_makes_the_bytes_that_the_command_makes_here(
    typed: Said, claim: Path, cluster: tuple[str, ...], tmp_path: Path
) -> None:
    code, shown, said = typed("shards", "make", "synthetic", claim / "syn", *SMALL, *cluster, "--dry-run")
    assert code == 0, said
    assert "packs in 1 process" in said
    container = pod_of(job_in(shown))["containers"][0]
    subprocess.run(container["command"], check=True, cwd=REPO, capture_output=True)
    assert typed("shards", "make", "synthetic", tmp_path / "here", *SMALL, "--workers", 1)[0] == 0
    assert digests(claim / "syn") == digests(tmp_path / "here") != {}


def test_what_is_shown_is_written_and_sent_once(
    typed: Said, server: FakeApi, claim: Path, cluster: tuple[str, ...], tmp_path: Path
) -> None:
    command = ("shards", "make", "/source/photos", claim / "My Photos", "--workers", 3, "--no-crop-ready", *cluster)
    _, shown, said = typed(*command, "--dry-run")
    assert "job (one pod does it), to context (current)" in said
    assert typed(*command, "--manifest", tmp_path / "job.yaml")[0] == 0
    assert (tmp_path / "job.yaml").read_text() == shown
    assert server.names("jobs") == []
    code, out, said = typed(*command)
    assert code == 0, said
    (name,) = server.names("jobs")
    assert name.startswith("shards-my-photos-")
    assert f"run         {name} was sent" in out
    assert f"logs        orchestrator logs {name} -f cluster=kubernetes" in out
    sent, wanted = server.objects[BATCH, "default", "jobs", name], job_in(shown)
    assert sent["spec"] == wanted["spec"]
    assert sent["metadata"]["labels"] == wanted["metadata"]["labels"]
    container = pod_of(sent)["containers"][0]
    assert container["command"] == [sys.executable, "-m", "jobs.make_shards", "/source/photos", f"{claim}/My Photos",
                                    "--no-crop-ready", "--workers", "3"]  # fmt: skip
    assert container["resources"]["requests"]["cpu"] == "3"
    assert (server.names("services"), server.names("networkpolicies")) == ([], [])
    facts = json.loads(typed(*command, "--json")[1])
    assert (facts["run_id"], facts["outcome"]) == (name, "there")
    assert typed(*command[:-5], *cluster, "--seed", 1)[0] == 0
    assert len(server.names("jobs")) == 2, "other options are another job"


def test_the_number_of_processes_makes_no_other_job(
    typed: Said, server: FakeApi, claim: Path, cluster: tuple[str, ...]
) -> None:
    for workers in ((), ("--workers", 1), ("--workers", 7)):
        assert typed("shards", "make", "digits", claim / "digits", *workers, *cluster)[0] == 0
    assert len(server.names("jobs")) == 1


REFUSED: dict[str, tuple[list[str], str]] = {
    "relative out": (["digits", "data/digits"], "OUT = data/digits: lies on no writable volume of cluster.volumes"),
    "out on no claim": (["digits", "/elsewhere/x"], "OUT = /elsewhere/x: lies on no writable volume"),
    "out on a claim to read": (["digits", "/source/x"], "OUT = /source/x: lies on no writable volume"),
    "out in a store": (["digits", "s3://bucket/x"], "OUT = s3://bucket/x: lies on no writable volume"),
    "source of this machine": (["photos", "CLAIM/x"], "SOURCE = photos: lies on no volume of cluster.volumes"),
    "source on no claim": (["/home/me/photos.tar", "CLAIM/x"], "SOURCE = /home/me/photos.tar: lies on no volume"),
    "torchvision here": (["torchvision:CIFAR10", "CLAIM/x"], "--root = data: lies on no volume"),
    "torchvision fetched": (["torchvision:X", "CLAIM/x", "--root", "/source/x", "--download"], "--root = /source/x"),
    "no image": (["digits", "CLAIM/x", "cluster.image=null"], "cluster.image = None: is what the pods start from"),
    "a key of a run": (["digits", "CLAIM/x", "seed=3"], "seed = 3: is no key of the cluster"),
    "a secret": (["digits", "CLAIM/x", "--root", "AKIAIOSFODNN7CANARY1"], "shards make = (hidden): holds a key"),
    "a secret's name": (["digits", "CLAIM/x", "cluster.env=['API_TOKEN=hush']"], "cluster.env = API_TOKEN=(hidden)"),
    "workers": (["digits", "CLAIM/x", "--workers", "0"], "--workers = 0"),
    "an option": (["digits", "CLAIM/x", "--quality", "101"], "--quality = 101"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_or_missed_is_refused_before_anything_is_sent(
    typed: Said, server: FakeApi, claim: Path, cluster: tuple[str, ...], case: str
) -> None:
    words, rule = REFUSED[case]
    flags = [word.replace("CLAIM", str(claim)) for word in words]
    code, _, said = typed("shards", "make", *cluster, *flags)
    assert (code, rule in said) == (42, True), said
    assert "Way out: " in said
    assert "CANARY" not in said
    assert server.names("jobs") == []


def test_ray_packs_nothing(typed: Said) -> None:
    code, _, said = typed("shards", "make", "digits", "/data/digits", "cluster=ray")
    assert (code, "cluster = ray: trains, and packs no shards" in said) == (42, True), said


def test_a_manifest_is_nothing_for_shards_that_are_made_here(typed: Said, tmp_path: Path) -> None:
    code, _, said = typed("shards", "make", "digits", tmp_path / "x", "--manifest", tmp_path / "y")
    assert (code, "--manifest" in said, (tmp_path / "x").exists()) == (42, True, False), said


def play(server: FakeApi, code: int, *lines: str) -> None:
    """The cluster runs the pod of each Job as soon as it is let go."""
    played: set[str] = set()

    def end(name: str) -> None:
        job = server.objects[BATCH, "default", "jobs", name]
        labels = job["spec"]["template"]["metadata"]["labels"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"{name}-0-abcde", "labels": labels},
               "spec": {"nodeName": "rig-a", "containers": [{"name": "shards"}]}}  # fmt: skip
        server.log(f"{name}-0-abcde").write(*lines)
        server.log(f"{name}-0-abcde").end()
        state = {"terminated": {"exitCode": code, "finishedAt": "2026-01-01T10:00:00Z",
                                "message": lines[-1] if code else None}}  # fmt: skip
        status = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [{"name": "shards", "state": state}]}
        server.put(CORE, "pods", {**pod, "status": status})
        end = condition("Failed", "PodFailurePolicy", f"exit code {code}") if code else condition("Complete")
        server.change(BATCH, "jobs", name, status={"conditions": [end]})

    def watch(kind: str, obj: dict[str, Any]) -> None:
        name = obj["metadata"]["name"]
        if obj.get("kind") == "Job" and obj["spec"].get("suspend") is False and name not in played:
            played.add(name)
            threading.Thread(target=end, args=(name,), daemon=True).start()

    server.after.append(watch)


@pytest.mark.parametrize(("code", "last"), [(0, "x-train  48"), (42, "error: /source/photos: no training image")])
def test_following_prints_the_log_and_ends_with_the_code_of_the_pod(
    typed: Said, server: FakeApi, claim: Path, cluster: tuple[str, ...], code: int, last: str
) -> None:
    play(server, code, "packing: 30/60 images", last)
    came, out, said = typed("shards", "make", "/source/photos", claim / "x", "--follow", *cluster)
    assert came == code, said
    assert out.endswith(f"[a0] packing: 30/60 images\n[a0] {last}\n")
    assert ("failed" in said, last in said.splitlines()[-1]) == ((True, True) if code else (False, False))
    assert [call for call in server.calls if call[0] == "POST" and "pull-" in call[1]] == []


def test_the_verbs_on_runs_work_on_it_and_those_that_cannot_say_so(
    typed: Said, server: FakeApi, claim: Path, cluster: tuple[str, ...]
) -> None:
    assert typed("shards", "make", "digits", claim / "digits", *cluster)[0] == 0
    (name,) = server.names("jobs")
    where = "cluster=kubernetes"
    assert [facts["run_id"] for facts in json.loads(typed("ls", where, "--json")[1])] == [name]
    assert json.loads(typed("status", "shards-digits", where, "--json")[1])["state"] == "starting"
    for verb in ("pull", "stack"):
        code, _, said = typed(verb, name, where)
        assert (code, f"ID {name} packs shards, which lie on their claim" in said) == (42, True), said
    assert typed("cancel", name, where)[0] == 0
    assert json.loads(typed("status", name, where, "--json")[1])["state"] == "stopped"
    assert typed("resume", name, where)[0] == 0
    server.change(BATCH, "jobs", name, status={"conditions": [condition("Failed", "BackoffLimitExceeded")]})
    assert typed("resume", name, where)[0] == 0
    server.change(BATCH, "jobs", name, status={"conditions": [condition("Complete")]})
    assert typed("logs", name, where)[0] == 0
    assert typed("rm", name, where)[0] == 0
    assert (server.names("jobs"), server.names("configmaps")) == ([], [])


def test_a_pod_that_is_told_to_go_says_so_and_the_next_one_goes_on(claim: Path) -> None:
    """The first process of a container hears only signals that it handles: the exit code must be its own."""
    words = [sys.executable, "-m", "jobs.make_shards", "synthetic", str(claim / "syn"), "--samples", "40000", "--size",
             "32", "--samples-per-shard", "500", "--workers", "1"]  # fmt: skip
    process = subprocess.Popen(words, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list((claim / "syn").rglob("*.tar")) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143
    done = digests(claim / "syn")
    assert done
    assert not (claim / "syn" / ".scratch").exists()
