"""A live cluster: whatever KUBECONFIG names, else the one that $ORCHESTRATOR_TEST_KUBE (or ../shared/kube) has started.

$ORCHESTRATOR_TEST_IMAGE: an image by digest that can be pulled there and has the requirements;
$ORCHESTRATOR_TEST_PYTHON: its interpreter; $ORCHESTRATOR_TEST_STORAGE: a storage class with ReadWriteMany.
The rig's own are taken where it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from launching import Cli, WarmServer

sys.path.insert(0, str(Path(__file__).parent))

from administrator import post
from live import MAKE_SHARDS, TRAIN, Cluster, Live

from orchestrator.bundle import freeze
from orchestrator.cluster.code import archive_of
from orchestrator.cluster.job import job_of
from orchestrator.cluster.kubernetes.api import Request, connect
from orchestrator.cluster.kubernetes.inventory import NAMESPACE
from orchestrator.cluster.kubernetes.render import render
from orchestrator.cluster.kubernetes.resources import ACCOUNT, CLAIM, KINDS, Resource
from orchestrator.cluster.kubernetes.submit import create
from orchestrator.compose import compose
from orchestrator.options import JobKind

PLURALS = {"Role": "roles", "RoleBinding": "rolebindings", "ServiceAccount": "serviceaccounts",
           "NetworkPolicy": "networkpolicies"}  # fmt: skip
BASE = Path(__file__).parents[2] / "k8s" / "base"


def rig_kubeconfig() -> str | None:
    """Of a cluster that the rig has started, if one is up."""
    beside = Path(__file__).parents[3] / "shared" / "kube"
    rig = Path(os.environ.get("ORCHESTRATOR_TEST_KUBE", beside)) / "rig"
    if not rig.is_file():
        return None
    told = subprocess.run([sys.executable, str(rig), "env"], capture_output=True, text=True, check=True).stdout
    path = told.partition("KUBECONFIG=")[2].partition(" ")[0]
    return path if Path(path).is_file() else None


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    kubeconfig = os.environ.get("KUBECONFIG") or rig_kubeconfig()
    if kubeconfig is None:
        pytest.skip("NO CLUSTER: KUBECONFIG is not set, and no rig is up at $ORCHESTRATOR_TEST_KUBE or ../shared/kube")
    own_image = Path(kubeconfig).parent / "image"
    image = os.environ.get("ORCHESTRATOR_TEST_IMAGE") or (own_image.read_text().strip() if own_image.exists() else "")
    if not image:
        pytest.skip("NO IMAGE: $ORCHESTRATOR_TEST_IMAGE names one by digest that the cluster can pull")
    python = os.environ.get("ORCHESTRATOR_TEST_PYTHON", sys.executable)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", kubeconfig)
        api = connect(namespace=f"orchestrator-test-{uuid.uuid4().hex[:6]}")
        yield Cluster(api, image, python, os.environ.get("ORCHESTRATOR_TEST_STORAGE", "shared"))


@pytest.fixture(scope="session")
def space(cluster: Cluster) -> Iterator[Cluster]:
    """A namespace as k8s/base makes it, which refuses what is not restricted, and a claim that all nodes write."""
    api, name = cluster.api, cluster.api.namespace
    for path in ("namespace", "service_account", "submitter_role", "submitter_binding", "network_policy"):
        obj = yaml.safe_load((BASE / f"{path}.yaml").read_text().replace(": training\n", f": {name}\n"))
        kind = obj["kind"]
        known = NAMESPACE if kind == "Namespace" else Resource(obj["apiVersion"], PLURALS[kind], kind)
        post(api, known, obj)
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}},
             "storageClassName": cluster.storage}  # fmt: skip
    post(api, CLAIM, {"metadata": {"name": cluster.claim}, "spec": claim})
    yield cluster
    api.delete(NAMESPACE, name)


@pytest.fixture(scope="session")
def server(space: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmServer]:
    """Commands that know the cluster and have the rights of k8s/base's submitter, no more."""
    folder = tmp_path_factory.mktemp("kube")
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 7200}}
    path = ACCOUNT.path(space.api.namespace, "submitter", "token")
    token = space.api.call(Request("POST", path, body=body))["status"]["token"]
    config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    config["users"] = [{**user, "user": {"token": token}} for user in config["users"]]
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
        warm = WarmServer(folder, [])
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def command(space: Cluster) -> Callable[..., str]:
    """Run a command on one node in the place of a launcher: with the code, the claim and the labels of a run."""

    def start(name: str, *words: str) -> str:
        archive = archive_of([])
        own = ("compute.num_nodes=1", "compute.num_processes=1", f"name={name}")
        bundle = freeze(compose([*TRAIN, *space.overrides("job", name), *own]))
        spec = replace(job_of(bundle, archive.digest), command=(space.python, *words))
        assert create(space.api, render(spec, JobKind.job, archive.content))
        return bundle.run_id

    return start


@pytest.fixture(scope="session")
def data(space: Cluster, server: WarmServer, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The claim with a synthetic set, made by a pod."""
    words = ("/runs/data/synthetic" if word == "OUT" else word for word in MAKE_SHARDS)
    there = (text for text in space.overrides("job", "none") if text.startswith("cluster"))
    answer = Cli(server, tmp_path_factory.mktemp("data"), ())("shards", "make", *words, "--follow", *there)
    assert answer.code == 0, answer.err
    return space


@pytest.fixture
def kind(request: pytest.FixtureRequest, data: Cluster) -> str:
    """What the test is parametrized with, where the cluster's operators serve it."""
    if not data.api.serves(KINDS[JobKind[request.param]]):
        pytest.skip(f"NOT SERVED: the cluster knows no {request.param}")
    return request.param


@pytest.fixture
def submit(server: WarmServer, data: Cluster, kind: str, tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """Send a run of some epochs and a seed; its objects are removed at the end, its folder with the claim."""
    cli, sent = Cli(server, tmp_path, ()), list[Live]()

    def send(*overrides: str) -> Live:
        answer = cli("train", *TRAIN, *overrides, *data.overrides(kind, f"{kind}-{uuid.uuid4().hex[:4]}"), "--json")
        assert answer.code == 0, answer.err
        live = Live(cli, data, answer.json()["run_id"])
        sent.append(live)
        return live

    yield send
    for live in sent:
        if live.facts()["state"] in ("queued", "starting", "running"):
            live.verb("cancel", "--now")
        assert live.verb("rm").code == 0


@pytest.fixture(scope="session")
def local_weights(server: WarmServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The same run on this machine; each once."""
    here = Cli(server, tmp_path_factory.mktemp("local"), ())
    out = here.cwd / "data" / "synthetic"
    known: dict[tuple[str, ...], str] = {}

    def train(*overrides: str) -> str:
        if not out.exists():
            made = here("shards", "make", *(str(out) if word == "OUT" else word for word in MAKE_SHARDS))
            assert made.code == 0, made.err
        if overrides not in known:
            answer = here("train", *TRAIN, *overrides, "--json")
            assert answer.code == 0, answer.err
            known[overrides] = answer.json()["weights_sha256"]
        return known[overrides]

    return train
