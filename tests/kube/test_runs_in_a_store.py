"""A run whose pods share no disk: its shards come from an object store, its record and checkpoints go there."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from launching import Answer, Cli, wait_for
from live import MAKE_SHARDS, TRAIN, Cluster

from orchestrator.cluster.kubernetes.api import Request
from orchestrator.cluster.kubernetes.pods import index_of, is_running
from orchestrator.cluster.kubernetes.resources import JOB, POD
from orchestrator.cluster.kubernetes.resources import SECRET as KEYS
from orchestrator.cluster.kubernetes.runs import pods_of
from orchestrator.train.bucket import Bucket

sys.path.append(str(Path(__file__).parents[1] / "data"))
from test_s3 import KEY, SECRET, Server, weed

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]
RIG = "10.77.0.1"
"""This machine as the rig's pods see it."""
LONG = (*TRAIN, "recipe.epochs=30", "checkpointing.every_steps=20", "recipe.ema_decay=0.9")


def own_address() -> str:
    address = os.environ.get("ORCHESTRATOR_TEST_HOST", RIG)
    try:
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError:
        pytest.skip(
            f"NO WAY BACK: pods reach this machine at $ORCHESTRATOR_TEST_HOST, and {address} is none of its own"
        )
    return address


@dataclass(frozen=True)
class Stored:
    """A store that this machine and the pods reach, with the shards in it."""

    cli: Cli
    cluster: Cluster
    there: tuple[str, ...]
    url: str

    def __call__(self, *words: object) -> Answer:
        return self.cli.cold(*words)

    def verb(self, name: str, run_id: str, *words: str) -> Answer:
        answer = self.cli.cold(name, run_id, *self.cluster.verbs, *words)
        assert answer.code == 0, answer.err
        return answer

    def state(self, run_id: str) -> str:
        return self.verb("status", run_id, "--json").json()["state"]

    def names(self, run_id: str) -> list[str]:
        bucket = Bucket(f"{self.url}/{run_id}")
        try:
            return bucket.names()
        finally:
            bucket.close()


@pytest.fixture
def stored(space: Cluster, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stored]:
    if weed is None:
        pytest.skip("NO STORE: no SeaweedFS (`weed`) in this environment")
    host = own_address()
    (tmp_path / "weed").mkdir()
    server = Server(tmp_path / "weed", host)
    server.start()
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    for name, value in {**keys, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    try:
        made = cli.cold("shards", "make", *("data/synthetic" if word == "OUT" else word for word in MAKE_SHARDS))
        assert made.code == 0, made.err
        wait_for(lambda: fill(server, host, cli.cwd / "data"), "the shards in the store", 120)
        text = "".join(f"{name}={value}\n" for name, value in keys.items())
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store"}, "stringData": {"keys": text}}
        space.api.call(Request("POST", KEYS.path(space.api.namespace), body=secret))
        left_out = ("cluster.volumes=", "runs_dir=", "data_dir=")
        base = tuple(word for word in space.overrides("job", "none") if not word.startswith(left_out))
        own = ("cluster.store_secret=store/keys", f"cluster.env=['AWS_ENDPOINT_URL={server.url}']",
               "runs_dir=s3://runs/kept", "data_dir=s3://runs/data")  # fmt: skip
        yield Stored(cli, space, (*base, *own), "s3://runs/kept")
    finally:
        server.stop()
        space.api.delete(KEYS, "store")


def fill(server: Server, host: str, folder: Path) -> bool:
    bucket = Bucket("s3://runs/data")
    try:
        requests.post(f"http://{host}:{server.filer}/buckets/runs/", timeout=5)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            bucket.put_file(str(path.relative_to(folder)), path)
    except OSError:
        return False
    finally:
        bucket.close()
    return True


def test_pods_without_any_volume_end_with_the_bits_of_this_machine_though_one_is_killed(stored: Stored) -> None:
    local = stored("train", *LONG, "data_dir=data", "--json")
    assert local.code == 0, local.err
    sent = stored("train", *LONG, *stored.there, "--json")
    assert sent.code == 0, sent.err
    run_id, api = sent.json()["run_id"], stored.cluster.api
    assert run_id == local.json()["run_id"]
    wait_for(lambda: any("manifest.json" in name for name in stored.names(run_id)), "a checkpoint in the store", 240)
    victim = next(pod for pod in pods_of(api, run_id) if index_of(pod) == 1 and is_running(pod))
    api.delete(POD, victim["metadata"]["name"], grace_s=0)
    wait_for(lambda: pause_and(stored.state(run_id) not in ("queued", "starting", "running")), "the end", 400)
    facts = stored.verb("status", run_id, "--json").json()
    assert (facts["state"], facts["attempt"], facts["folder"]) == ("done", 2, f"{stored.url}/{run_id}"), facts
    lines = [json.loads(line) for line in stored.verb("logs", run_id, "--rank", "0", "--json").out.splitlines()]
    assert {line["attempt"] for line in lines} == {1, 2}
    folder = Path(stored.verb("pull", run_id, "--to", "pulled", "--checkpoints", "--json").json()["folder"])
    result = json.loads((stored.cli.cwd / folder / "result.json").read_text())
    for key in ("state_sha256", "weights_sha256", "metrics", "step"):
        assert result[key] == local.json()[key], key
    assert not any(job["metadata"]["name"].startswith("pull-") for job in api.list(JOB)[0]), "no reader was needed"
    assert stored.verb("rm", run_id).code == 0
    assert [run["run_id"] for run in stored("ls", "--runs-dir", stored.url, "--json").json()] == [run_id]
    evaluated = stored("evaluate", f"checkpoint=pulled/{run_id}", "data_dir=data", "--json")
    assert evaluated.json()["metrics"]["val/acc1"] == result["metrics"]["val/acc1"], evaluated.err


def pause_and(value: bool) -> bool:
    """A command each moment would take the processor from the pods."""
    time.sleep(0 if value else 2)
    return value
