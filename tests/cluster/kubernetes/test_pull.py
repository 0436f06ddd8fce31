"""The run's folder through the log of a reader: what is sent is what stands there, and nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_api import FakeApi
from objects import LABELS, RUN_ID, Object, pod, run_object, template

from orchestrator.cluster.kubernetes import logs, pull, reader
from orchestrator.cluster.kubernetes.api import Api
from orchestrator.cluster.kubernetes.backend import KubernetesBackend
from orchestrator.cluster.kubernetes.pull import Receiver, reader_job
from orchestrator.errors import TransientError, UserError

CORE, BATCH = "/api/v1", "/apis/batch/v1"
Lines = Callable[[list[str]], list[str]]


class Node:
    """Runs the program of a reader's Job on this machine and gives its output to the fake server."""

    def __init__(self, server: FakeApi):
        self.server = server
        self.spoil: Lines = lambda lines: lines
        self.sent: list[list[str]] = []
        server.after.append(self.run)

    def run(self, kind: str, job: Object) -> None:
        name = job["metadata"]["name"]
        if kind != "ADDED" or job.get("kind") != "Job" or not name.startswith("pull-"):
            return
        command = [word.replace("$$(", "$(") for word in job["spec"]["template"]["spec"]["containers"][0]["command"]]
        done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, check=True)
        self.sent.append(done.stdout.splitlines())
        made = pod(0, "Succeeded", name=name, state={"terminated": {"exitCode": 0}})
        made["metadata"]["labels"] = job["spec"]["template"]["metadata"]["labels"]
        log = self.server.log(made["metadata"]["name"])
        log.write(*self.spoil(done.stdout.splitlines()))
        self.server.put(CORE, "pods", made)


@pytest.fixture
def folder(tmp_path: Path, server: FakeApi) -> Path:
    """Of a run whose claim this machine sees at the place where the pods see it."""
    runs = tmp_path / "claim"
    made = runs / RUN_ID
    for path, content in {
        "run.json": b"{}", "logs/attempt_1/rank_0.log": b"x" * 30_000, "lock": b"", "events/rank_0.jsonl": b"",
        "checkpoints/step_1/model.safetensors": bytes(range(256)) * 200, ".attempt_1.x/half": b"half",
        "with space/$(dollar)": "ä".encode(),
    }.items():  # fmt: skip
        (made / path).parent.mkdir(parents=True, exist_ok=True)
        (made / path).write_bytes(content)
    (made / "link").symlink_to("/etc/passwd")
    run = run_object()
    run["spec"]["template"]["spec"]["containers"][0]["volumeMounts"] = [{"name": "runs", "mountPath": str(runs)}]
    server.put(BATCH, "jobs", run)
    bundle = json.dumps({"config": {"runs_dir": str(runs)}})
    server.put(
        CORE, "configmaps", {"metadata": {"name": f"run-{RUN_ID}", "labels": LABELS}, "data": {"run.json": bundle}}
    )
    return made


@pytest.fixture
def node(server: FakeApi, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(pull, "POLL_S", 0.01)
    monkeypatch.setattr(logs, "PAUSE_S", 0.01)
    monkeypatch.setattr(pull, "BYTES_PER_S", 1 << 40)
    return Node(server)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_comes_as_it_stands_there(folder: Path, node: Node, api: Api, tmp_path: Path) -> None:
    came = KubernetesBackend(api).pull(RUN_ID, tmp_path / "here")
    assert came == tmp_path / "here" / RUN_ID
    assert sorted(contents(came)) == [
        "events/rank_0.jsonl",
        "logs/attempt_1/rank_0.log",
        "run.json",
        "with space/$(dollar)",
    ]
    assert all(content == contents(folder)[path] for path, content in contents(came).items())
    assert node.server.names("jobs") == [RUN_ID]
    assert max(map(len, node.sent[0])) < 16_384


def test_checkpoints_come_where_they_are_asked_for(folder: Path, node: Node, api: Api, tmp_path: Path) -> None:
    came = KubernetesBackend(api).pull(RUN_ID, tmp_path / "here", checkpoints=True)
    assert (came / "checkpoints/step_1/model.safetensors").read_bytes() == bytes(range(256)) * 200


def test_a_second_pull_brings_only_what_has_grown(folder: Path, node: Node, api: Api, tmp_path: Path) -> None:
    backend = KubernetesBackend(api)
    came = backend.pull(RUN_ID, tmp_path / "here")
    with open(folder / "logs/attempt_1/rank_0.log", "ab") as file:
        file.write(b"more")
    (came / "run.json").write_bytes(b"[]")
    backend.pull(RUN_ID, tmp_path / "here")
    assert len([line for line in node.sent[1] if line.startswith("part")]) == 2
    assert (came / "logs/attempt_1/rank_0.log").read_bytes() == b"x" * 30_000 + b"more"
    assert (came / "run.json").read_bytes() == b"{}"


def test_lines_that_a_log_lost_are_asked_for_again(folder: Path, node: Node, api: Api, tmp_path: Path) -> None:
    node.spoil = lambda lines: (
        [line for line in lines if not line.startswith("part 1 ")] if len(node.sent) == 1 else lines
    )
    came = KubernetesBackend(api).pull(RUN_ID, tmp_path / "here")
    assert (came / "logs/attempt_1/rank_0.log").read_bytes() == b"x" * 30_000
    assert len(node.sent) == 2
    assert json.loads(node.sent[1][2].partition(" ")[2])["from"] == reader.PART


def test_a_log_that_always_loses_lines_is_transient(folder: Path, node: Node, api: Api, tmp_path: Path) -> None:
    node.spoil = lambda lines: lines[:-1]
    with pytest.raises(TransientError, match="did not come whole in 3 tries"):
        KubernetesBackend(api).pull(RUN_ID, tmp_path / "here")
    assert node.server.names("jobs") == [RUN_ID]


def test_a_run_without_a_folder_yet_is_named(folder: Path, node: Node, api: Api, tmp_path: Path) -> None:
    folder.rename(folder.with_name("away"))
    with pytest.raises(UserError, match="the claim has no such folder yet"):
        KubernetesBackend(api).pull(RUN_ID, tmp_path / "here")


def test_a_reader_that_does_not_start_says_why(
    folder: Path, server: FakeApi, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "START_S", 0.1)
    with pytest.raises(TransientError, match="did not start in 0 s: its pod was not made"):
        KubernetesBackend(api).pull(RUN_ID, tmp_path / "here")
    assert server.names("jobs") == [RUN_ID]


@pytest.mark.parametrize("path", ["../out", "/etc/out"])
def test_nothing_is_written_outside_of_the_folder(tmp_path: Path, path: str) -> None:
    lines = [f'file {{"path": "{path}", "size": 1, "from": 0}}', "part 0 eA=="]
    with pytest.raises(UserError, match="lies outside"):
        Receiver(tmp_path / "here").take(lines)


def test_the_reader_is_restricted_and_writes_nowhere() -> None:
    wanted = template()
    wanted["spec"]["containers"][0]["securityContext"] = {"allowPrivilegeEscalation": False}
    wanted["spec"]["securityContext"] = {"runAsNonRoot": True}
    job = reader_job("pull-x-1", wanted, f"/runs/{RUN_ID}", {})
    spec = job["spec"]["template"]["spec"]
    assert spec["securityContext"] == {"runAsNonRoot": True}
    assert spec["containers"][0]["securityContext"] == {"allowPrivilegeEscalation": False}
    assert spec["containers"][0]["volumeMounts"] == [{"name": "runs", "mountPath": "/runs", "readOnly": True}]
    assert [volume["name"] for volume in spec["volumes"]] == ["runs"]
    assert "orchestrator/run" not in job["metadata"]["labels"]
    with pytest.raises(UserError, match="no claim of the run holds it"):
        reader_job("pull-x-1", wanted, "/elsewhere", {})


def test_attempts_whose_pods_are_gone_are_read_from_the_folder(folder: Path, node: Node, api: Api) -> None:
    for attempt in (1, 2, 3):
        (folder / f"logs/attempt_{attempt}").mkdir(exist_ok=True)
        (folder / f"logs/attempt_{attempt}/rank_0.log").write_text(f"one of {attempt}\ntwo of {attempt}\n")
    backend = KubernetesBackend(api)
    assert list(backend.logs(RUN_ID, False, None)) == [], "a run that starts has no earlier attempts"
    node.server.change(BATCH, "jobs", RUN_ID, spec={"suspend": True})
    assert [line.text for line in backend.logs(RUN_ID, False, None)] == [
        f"{which} of {attempt}" for attempt in (1, 2, 3) for which in ("one", "two")
    ]
    node.server.put(CORE, "pods", pod(0))
    node.server.log(f"{RUN_ID}-0-aaaaa").write("[a0 n0 #1] begins", "[a3 r0 #1] one of 3", "[a3 r0 #2] two of 3")
    lines = list(backend.logs(RUN_ID, False, 0))
    assert [(line.attempt, line.number) for line in lines] == [(a, n) for a in (1, 2, 3) for n in (1, 2)]
    assert not any("attempt_3" in line for line in node.sent[-1])


def test_a_folder_out_of_reach_is_said_and_the_pods_are_read(
    folder: Path, node: Node, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    node.server.remove(CORE, "configmaps", f"run-{RUN_ID}")
    node.server.put(CORE, "pods", pod(0))
    node.server.log(f"{RUN_ID}-0-aaaaa").write("[a2 r0 #1] one")
    assert [line.text for line in KubernetesBackend(api).logs(RUN_ID, False, None)] == ["one"]
    assert "the logs of earlier attempts are not shown" in caplog.text


def test_a_run_kept_in_a_store_is_read_there_without_a_reader(
    folder: Path, node: Node, api: Api, tmp_path: Path
) -> None:
    bundle = json.dumps({"config": {"runs_dir": f"file://{folder.parent}"}})
    node.server.change(CORE, "configmaps", f"run-{RUN_ID}", data={"run.json": bundle})
    for attempt in (1, 2):
        (folder / f"logs/attempt_{attempt}").mkdir(exist_ok=True)
        (folder / f"logs/attempt_{attempt}/rank_0.log").write_text(f"one of {attempt}\n")
    (folder / "result.json").write_text('{"state": "stopped", "step": 7, "exit_code": 45}')
    node.server.change(BATCH, "jobs", RUN_ID, spec={"suspend": True})
    backend = KubernetesBackend(api)
    assert [line.text for line in backend.logs(RUN_ID, False, None)] == ["one of 1", "one of 2"]
    facts = backend.status(RUN_ID)
    assert (facts["state"], facts["step"], facts["folder"]) == ("stopped", 7, f"file://{folder.parent}/{RUN_ID}")
    came = backend.pull(RUN_ID, tmp_path / "here")
    assert (came / "logs/attempt_2/rank_0.log").read_text() == "one of 2\n"
    assert not (came / "checkpoints").exists()
    assert node.sent == [], "no reader was started"


def test_a_run_on_ray_is_read_by_the_interpreter_of_its_hook() -> None:
    """KubeRay writes the command of the pods that train."""
    wanted = template()
    (node,) = wanted["spec"]["containers"]
    del node["command"]
    node["lifecycle"] = {"preStop": {"exec": {"command": ["/opt/python", "-m", "jobs.ray_driver"]}}}
    (container,) = reader_job("pull-x-1", wanted, f"/runs/{RUN_ID}", {})["spec"]["template"]["spec"]["containers"]
    assert container["command"][0] == "/opt/python"
    assert "lifecycle" not in container
