"""Runs as they are sent to Kubernetes and Ray from the command line: shown, written, submitted, followed."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import REPO

from orchestrator.cli.main import main
from orchestrator.cluster import code
from orchestrator.cluster.kubernetes import api as shell
from orchestrator.cluster.ray.api import Dashboard

sys.path[:0] = [str(REPO / "tests" / "cluster" / "kubernetes"), str(REPO / "tests" / "cluster" / "ray")]

from fake_api import TOKEN, FakeApi  # noqa: E402
from fake_ray import FakeRay, serving  # noqa: E402

IMAGE = f"registry.example/train@sha256:{'1' * 64}"
ADDED = ("uid", "resourceVersion", "creationTimestamp", "namespace", "ownerReferences")
CORE = "/api/v1"


class Typed:
    """The command line in this process; what it said and its exit code."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        self._capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        self.out, self.err = self._capsys.readouterr()
        return code


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    return Typed(capsys)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    fake = FakeApi()
    content = {
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "ada"}}],
        "clusters": [{"name": "test", "cluster": {"server": fake.url}}],
        "users": [{"name": "ada", "user": {"token": TOKEN}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(json.dumps(content))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    for claim in ("runs", "data"):
        modes = {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"}}
        fake.put(CORE, "persistentvolumeclaims", {"metadata": {"name": claim}, **modes})
    yield fake
    fake.close()


class QuickRay(FakeRay):
    """Every job has run by the time that its submission is answered."""

    def _submit(self, request: dict[str, Any]) -> tuple[int, Any]:
        answer = super()._submit(request)
        words = {"schema": 1, "run_id": request["submission_id"], "attempt": 1, "exit_code": 43, "error": "no progress"}
        self.jobs[request["submission_id"]].update(status="FAILED", message=json.dumps(words))
        self.logs[request["submission_id"]] = "[a1 r0 #1] first\n[a1 r1 #1] second\n"
        return answer


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    # the fake speaks no web socket: what it has is the whole log
    monkeypatch.setattr(Dashboard, "follow", lambda self, submission_id: iter([self.logs(submission_id)]))
    (tmp_path / "token").write_text("secret-token")
    (tmp_path / "token").chmod(0o600)
    with serving(QuickRay()) as fake:
        yield fake


@pytest.fixture
def to_kubernetes(small: tuple[str, ...], shards: Path) -> tuple[str, ...]:
    volumes = f"[{{claim: runs, path: /runs, read_only: false}}, {{claim: data, path: {shards}, read_only: true}}]"
    return (*small, "cluster=kubernetes", f"cluster.image={IMAGE}", "cluster.kind=job", "cluster.code=image",
            "runs_dir=/runs", "compute.num_nodes=2", f"cluster.volumes={volumes}")  # fmt: skip


@pytest.fixture
def to_ray(small: tuple[str, ...], ray: FakeRay, tmp_path: Path) -> tuple[str, ...]:
    return (*small, "cluster=ray", f"cluster.address={ray.address}", f"cluster.token_file={tmp_path / 'token'}",
            "cluster.code=image", "runs_dir=/nowhere/runs")  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Code that is small and at rest."""
    root = tmp_path / "checkout"
    for path in ("orchestrator/__init__.py", "jobs/node.py"):
        (root / path).parent.mkdir(parents=True)
        (root / path).write_text("X = 1\n")
    monkeypatch.setattr(code, "archive_of", partial(code.archive_of, root=root))
    return root


def kept(server: FakeApi) -> dict[tuple[str, str], Any]:
    """What the server holds of a run, without what it adds itself."""
    found = {}
    for (_, _, plural, name), obj in server.objects.items():
        if plural != "persistentvolumeclaims":
            notes = {
                k: v for k, v in (obj["metadata"].get("annotations") or {}).items() if k != "orchestrator/submission"
            }
            metadata = {k: v for k, v in obj["metadata"].items() if k not in ADDED} | {"annotations": notes}
            found[obj["kind"], name] = _unsuspended({**obj, "metadata": metadata})
    return found


def _unsuspended(obj: dict[str, Any]) -> dict[str, Any]:
    spec = {k: v for k, v in obj.get("spec", {}).items() if k != "suspend"}
    metadata = {k: v for k, v in obj["metadata"].items() if v}
    sent = {k: v for k, v in obj.items() if k != "status"}  # the controllers'
    return {**sent, "metadata": metadata, **({"spec": spec} if spec else {})}


def test_what_a_dry_run_prints_and_a_manifest_holds_is_what_is_sent(
    typed: Typed, server: FakeApi, to_kubernetes: tuple[str, ...], tmp_path: Path
) -> None:
    assert typed("train", *to_kubernetes, "--dry-run") == 0, typed.err
    printed = typed.out
    assert "job (cluster.kind names it), to context (current)" in typed.err
    assert typed("train", *to_kubernetes, "--manifest", tmp_path / "run.yaml") == 0
    assert (tmp_path / "run.yaml").read_text() == printed
    assert f"nothing was sent: kubectl create -f {tmp_path / 'run.yaml'}" in typed.err
    assert kept(server) == {}
    assert typed("train", *to_kubernetes) == 0, typed.err
    shown = {(obj["kind"], obj["metadata"]["name"]): _unsuspended(obj) for obj in yaml.safe_load_all(printed)}
    assert kept(server) == shown


@pytest.mark.parametrize("absent", ["no kubeconfig", "no server"])
def test_auto_is_shown_as_a_plain_job_where_no_cluster_answers_and_is_not_sent(
    typed: Typed, server: FakeApi, to_kubernetes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    absent: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(shell, "PAUSES_S", (0.01,))
    auto = [*to_kubernetes, "cluster.kind=auto"]
    assert typed("train", *auto, "--dry-run") == 0, typed.err
    assert "jobset (it starts all nodes again together" in typed.err, "the one that is there is asked"
    assert typed("train", *to_kubernetes, "--dry-run") == 0, typed.err
    plain = typed.out
    if absent == "no server":
        server.close()
    else:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    assert typed("train", *auto, "--dry-run") == 0, typed.err
    (said,) = [line for line in typed.err.splitlines() if "cluster.kind=..." in line]
    assert said.startswith("shown as a plain job")
    assert ("does not answer" if absent == "no server" else "there is no kubeconfig") in said
    shown = typed.out
    assert [obj["kind"] for obj in yaml.safe_load_all(shown)] == [obj["kind"] for obj in yaml.safe_load_all(plain)]
    assert typed("train", *auto, "--manifest", tmp_path / "run.yaml") == 0, typed.err
    assert (tmp_path / "run.yaml").read_text() == shown
    assert typed("train", *auto) in (42, 75), "what is sent needs a cluster"


def test_a_context_that_is_misspelt_is_refused_by_a_dry_run_too(
    typed: Typed, server: FakeApi, to_kubernetes: tuple[str, ...]
) -> None:
    assert typed("train", *to_kubernetes, "cluster.kind=auto", "cluster.context=tset", "--dry-run") == 42
    assert "cluster.context = tset: the kubeconfig has no such context" in typed.err


def test_a_submission_says_where_it_went_and_what_comes_next_and_is_sent_once(
    typed: Typed, server: FakeApi, to_kubernetes: tuple[str, ...]
) -> None:
    assert typed("train", *to_kubernetes) == 0, typed.err
    (job,) = server.names("jobs")
    rows = dict(line.split(maxsplit=1) for line in typed.out.splitlines())
    assert rows["run"] == f"{job} was sent"
    assert rows["kind"] == "Job (cluster.kind names it)"
    assert rows["where"] == f"{server.url}, context test, namespace default"
    assert rows["logs"] == f"orchestrator logs {job} -f cluster=kubernetes"
    facts = json.loads(typed.out) if typed("train", *to_kubernetes, "--json") == 0 else {}
    assert (facts["run_id"], facts["outcome"], facts["archive"]) == (job, "there", None)
    assert server.names("jobs") == [job]


def test_a_cluster_of_one_s_own_is_named_in_what_comes_next(
    typed: Typed, server: FakeApi, to_kubernetes: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "groups" / "cluster").mkdir(parents=True)
    own = "defaults: [kubernetes]\ncontext: test\nspread: any\n"
    (tmp_path / "groups" / "cluster" / "campus.yaml").write_text(own)
    command = ["cluster=campus" if text == "cluster=kubernetes" else text for text in to_kubernetes]
    assert typed("train", *command, "--config-dir", tmp_path / "groups", "cluster.namespace=default") == 0, typed.err
    rows = dict(line.split(maxsplit=1) for line in typed.out.splitlines())
    end = f"cluster=campus cluster.namespace=default --config-dir {tmp_path}/groups"
    assert rows["stop"].endswith(end)
    assert typed(*rows["status"].split()[1:]) == 0, typed.err


def test_the_archive_is_sent_as_it_is_shown(
    typed: Typed, server: FakeApi, to_kubernetes: tuple[str, ...], checkout: Path
) -> None:
    assert typed("train", *to_kubernetes, "cluster.code=archive", "--json") == 0, typed.err
    archive = json.loads(typed.out)["archive"]
    assert f"code: 2 files, 0 KiB, sha256 {archive['sha256'][:12]}, of the installed package" in typed.err
    sent = server.objects[CORE, "default", "configmaps", f"code-{archive['sha256'][:12]}"]
    content = base64.b64decode(sent["binaryData"]["code.tar.gz"])
    assert len(content) == archive["bytes"]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == ["jobs/node.py", "orchestrator/__init__.py"]


def test_a_secret_in_the_code_stops_a_submission_before_anything_is_sent(
    typed: Typed, server: FakeApi, to_kubernetes: tuple[str, ...], checkout: Path
) -> None:
    (checkout / "jobs" / "node.py").write_text("KEY = 'AKIAIOSFODNN7CANARY1'\n")
    assert typed("train", *to_kubernetes, "cluster.code=archive") == 42
    assert "jobs/node.py:1 (key of AWS)" in typed.err
    assert "AKIA" not in typed.err
    assert kept(server) == {}


def test_code_that_no_object_takes_is_refused_by_its_largest_files_or_goes_to_the_store_of_the_run(
    typed: Typed, server: FakeApi, to_kubernetes: tuple[str, ...], checkout: Path
) -> None:
    (checkout / "weights.bin").write_bytes(os.urandom(1 << 20))
    large = [*to_kubernetes, "cluster.code=archive", "cluster.code_files=[weights.bin]"]
    assert typed("train", *large) == 42
    assert (
        "cluster.code = archive: makes 1025 KiB, an object of Kubernetes takes 900; the largest of its 3 files: "
        in (typed.err)
    )
    assert "weights.bin (1024 KiB)" in typed.err
    assert kept(server) == {}
    assert typed("train", *large, "checkpointing.mirror=s3://bucket/runs", "--dry-run") == 0, typed.err
    assert "the code goes to s3://bucket/runs/code-" in typed.err
    assert "name: fetch-code" in typed.out


def test_data_that_is_reached_from_here_is_checked_and_data_that_is_not_is_said(
    typed: Typed, server: FakeApi, to_kubernetes: tuple[str, ...]
) -> None:
    assert typed("train", *to_kubernetes, "compute.virtual_ranks=64") == 42
    assert "leaves steps of 15 images (108 samples in 7 steps) for 64" in typed.err
    assert typed("train", *to_kubernetes, "model=timm", "model.name=resnet19") == 42
    assert "resnet19" in typed.err
    there = ("data.train=/runs/train", "data.val=/runs/val")
    assert typed("train", *to_kubernetes, *there) == 0, typed.err
    assert "the data is not checked before it is needed: /runs/train" in typed.err
    assert len(server.names("jobs")) == 1


def test_ray_is_sent_what_a_dry_run_prints_with_the_token_of_the_file(
    typed: Typed, ray: FakeRay, to_ray: tuple[str, ...]
) -> None:
    assert typed("train", *to_ray, "--dry-run", "--json") == 0, typed.err
    shown = json.loads(typed.out)
    assert ray.jobs == {}
    assert typed("train", *to_ray) == 0, typed.err
    (job,) = ray.jobs.values()
    assert {key: job[key] for key in shown["submission"]} == shown["submission"]
    assert f"run         {shown['run_id']} was sent" in typed.out
    assert "secret-token" not in typed.out + typed.err + json.dumps(job)


def test_following_prints_the_lines_and_ends_with_the_code_of_the_run(
    typed: Typed, ray: FakeRay, to_ray: tuple[str, ...]
) -> None:
    assert typed("train", *to_ray, "--follow") == 43
    assert "[a1 r0] first\n[a1 r1] second\n" in typed.out
    assert "failed (no progress)" in typed.err
    assert typed("train", *to_ray, "--follow", "--json") == 43
    assert [json.loads(line)["text"] for line in typed.out.splitlines()] == ["first", "second"] * 2


def test_verbs_ask_the_cluster_that_the_overrides_name(
    typed: Typed, ray: FakeRay, to_ray: tuple[str, ...], server: FakeApi, to_kubernetes: tuple[str, ...]
) -> None:
    assert typed("train", *to_ray) == 0
    assert typed("train", *to_kubernetes) == 0
    (run_id,) = server.names("jobs")
    for cluster, state in ((to_ray, "failed"), (to_kubernetes, "starting")):
        chosen = [text for text in cluster if text.startswith("cluster")]
        assert typed("ls", *chosen, "--json") == 0, typed.err
        assert [(facts["run_id"], facts["state"]) for facts in json.loads(typed.out)] == [(run_id, state)]
        assert typed("ls", *chosen) == 0
        assert run_id in typed.out
        assert typed("status", run_id[:-2], *chosen) == 0, typed.err
        assert f"state          {state}" in typed.out
        assert typed("status", "nothing-like-it", *chosen) == 42
        assert "Way out: orchestrator ls cluster=" in typed.err


REFUSED: dict[str, Callable[[tuple[str, ...], tuple[str, ...]], tuple[tuple[object, ...], str]]] = {
    "manifest of ray": lambda k, r: ((*r, "--manifest", "x"), "--manifest = cluster=ray: writes objects of Kubernetes"),
    "canary there": lambda k, r: ((*k, "--canary"), "--canary = cluster=kubernetes: tries a run on this machine"),
    "password in the config": lambda k, r: ((*k, "data.train=https://a:canary@h/x"), "data.train = (hidden)"),
    "folder on no volume": lambda k, r: ((*k, "runs_dir=/elsewhere"), "runs_dir = /elsewhere: lies on no writable"),
    "no tag": lambda k, r: ((*k, "cluster.image=reg/train:latest"), "cluster.image = reg/train:latest"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sent_is_refused_by_key_and_nothing_is_half_submitted(
    typed: Typed, case: str, server: FakeApi, ray: FakeRay, to_kubernetes: tuple[str, ...], to_ray: tuple[str, ...]
) -> None:
    arguments, said = REFUSED[case](to_kubernetes, to_ray)
    assert typed("train", *arguments) == 42
    assert said in typed.err
    assert "Way out: " in typed.err
    assert "canary@" not in typed.err
    assert (kept(server), ray.jobs) == ({}, {})


def test_no_canary_is_a_key_of_the_config_that_is_sent(typed: Typed, to_ray: tuple[str, ...]) -> None:
    for flags, canary in (((), True), (("--no-canary",), False)):
        assert typed("train", *to_ray, "--dry-run", "--json", *flags) == 0, typed.err
        assert json.loads(typed.out)["run.json"]["config"]["cluster"]["canary"] is canary


def test_two_nodes_are_not_here(typed: Typed, small: tuple[str, ...]) -> None:
    assert typed("train", *small, "compute.num_nodes=2") == 42
    assert "compute.num_nodes = 2: needs more machines than this one" in typed.err


def test_a_key_that_could_not_be_read_is_refused_before_anything_starts(typed: Typed, small: tuple[str, ...]) -> None:
    online = [*(text for text in small if text != "tracking=disabled"), "tracking=online", "tracking.secret=/no/key"]
    assert typed("train", *online) == 42
    assert "tracking.secret = /no/key: names /no/key, which cannot be read" in typed.err


def test_a_manifest_is_nothing_for_a_run_that_stays_here(typed: Typed, small: tuple[str, ...]) -> None:
    assert typed("train", *small, "--manifest", "x") == 42
    assert "Way out: cluster=kubernetes" in typed.err
