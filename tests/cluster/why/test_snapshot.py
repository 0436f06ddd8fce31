"""A snapshot: what it holds, what it leaves out, and that it can be read again, also from what kubectl prints."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kubernetes"))

from fake_api import FakeApi, write_kubeconfig
from objects import LABELS, RUN_ID, pod, run_object
from profiles import bundle_of
from scenes import SPACE, healthy
from stuck_runs import no_secret

from orchestrator.bundle import content_of
from orchestrator.cli.main import main
from orchestrator.cluster.job import PACKS
from orchestrator.cluster.kubernetes import inventory
from orchestrator.cluster.kubernetes.api import Api, connect
from orchestrator.cluster.kubernetes.pod import COMPONENT
from orchestrator.cluster.kubernetes.survey import survey
from orchestrator.cluster.snapshot import read_snapshot
from orchestrator.cluster.why.verdict import explain
from orchestrator.errors import UserError

CORE, BATCH, KUEUE = "/api/v1", "/apis/batch/v1", "/apis/kueue.x-k8s.io/v1beta1"
CANARY = "s3cr3tCanaryValue9"
MORE = {
    CORE: ["nodes", "namespaces", "resourcequotas", "limitranges"],
    KUEUE: ["clusterqueues", "resourceflavors"],
    "/apis/storage.k8s.io/v1": ["storageclasses"],
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    fake = FakeApi()
    for root, names in MORE.items():
        fake.served[root] = [*fake.served.get(root, []), *names]
    write_kubeconfig(tmp_path / "kubeconfig", fake.url)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield fake
    fake.close()


@pytest.fixture
def api(server: FakeApi) -> Api:
    server.put(BATCH, "jobs", run_object())
    for index in (0, 1):
        server.put(CORE, "pods", pod(index))
    for name in ("rig-a", "rig-b"):
        status = {"images": [{"names": ["a", "b"], "sizeBytes": 5}]}
        server.put(CORE, "nodes", {"metadata": {"name": name}, "spec": {}, "status": status}, namespace="")
    other = pod(0, name="other-99999999")
    server.put(CORE, "pods", other, namespace="elsewhere")
    return connect()


def write(path: Path, *documents: Any) -> Path:
    path.write_text("\n".join(json.dumps(document) for document in documents))
    return path


def test_a_survey_holds_the_run_its_surroundings_and_its_last_lines(server: FakeApi, api: Api) -> None:
    facts = '{"schema": 1, "state": "running", "attempt": 1, "step": 7, "total_steps": 40, "world_size": 2}'
    server.log(f"{RUN_ID}-0-aaaaa").write(f"[a1 n0 progress] {facts}", "[a1 r0 #1] step 7")
    taken = survey(api, RUN_ID)
    assert [one["metadata"]["name"] for one in taken.of("Job")] == [RUN_ID]
    assert {one["metadata"]["namespace"] for one in taken.of("Pod")} == {"default", "elsewhere"}
    assert [one["status"]["images"] for one in taken.of("Node")] == [[{"names": ["a", "b"]}], []], "each image once"
    assert taken.record["facts"]["step"] == 7
    assert taken.record["lines"][0] == {"pod": f"{RUN_ID}-0-aaaaa", "attempt": 1, "rank": 0, "lines": ["step 7"]}
    assert "the cluster does not serve rayclusters" in (taken.unread("RayCluster") or "")
    assert taken.unread("Pod") is None
    assert explain(taken).said == "step 7 of 40"


def run_out_of_memory(server: FakeApi) -> None:
    killed = pod(0)
    killed["status"] |= {"phase": "Failed", "containerStatuses": [
        {"name": "train", "state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}
    ]}  # fmt: skip
    killed["spec"]["containers"] = [{"name": "train", "resources": {"limits": {"memory": "24Gi"}}}]
    server.put(CORE, "pods", killed)


def test_of_a_run_that_packs_shards_no_step_is_predicted(server: FakeApi, api: Api) -> None:
    packer = run_object()
    packer["metadata"]["labels"] |= {COMPONENT: PACKS}
    server.put(BATCH, "jobs", packer)
    run_out_of_memory(server)
    assert "predicted" not in survey(api, RUN_ID).record


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cpu", r"limit of 24Gi; predicted: 2 x \d+ MiB = \d+ MiB for a step, besides"),
        ("cuda", "limit of 24Gi$"),
    ],
)
def test_what_a_pod_had_and_what_was_predicted_are_told_where_memory_ran_out(
    device: str, said: str, server: FakeApi, api: Api
) -> None:
    bundle = bundle_of(
        "model=resnet18",
        "recipe.global_batch_size=32",
        "compute=cpu2",
        "compute.num_nodes=2",
        "compute.num_processes=4",
        f"compute.device={device}",
    )
    run = {"metadata": {"name": f"run-{RUN_ID}"}, "data": {"run.json": json.dumps(content_of(bundle, {}))}}
    server.put(CORE, "configmaps", run)
    run_out_of_memory(server)
    (first, *_) = explain(survey(api, RUN_ID)).causes
    assert first.name == "out-of-memory"
    assert re.search(said, first.said), first.said


def test_of_other_runs_it_holds_where_they_lie_and_what_they_take_and_no_more(server: FakeApi, api: Api) -> None:
    spec = {
        "nodeName": "rig-a",
        "containers": [{"name": "c", "image": "x", "command": ["a"], "resources": {"requests": {"cpu": "1"}}}],
    }
    server.put(
        CORE, "pods", {"metadata": {"name": "p", "annotations": {"a": "b"}}, "spec": spec}, namespace="elsewhere"
    )
    found = next(one for one in survey(api, RUN_ID).of("Pod") if one["metadata"]["name"] == "p")
    assert found["spec"] == {
        "nodeName": "rig-a",
        "containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}],
    }
    assert "annotations" not in found["metadata"]


def test_no_secret_is_in_it(server: FakeApi, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)  # so that it is known as a secret wherever it turns up
    hidden = "another-canary-42x"
    one = pod(0)
    one["spec"]["containers"][0]["env"] = [{"name": "PLAIN", "value": hidden}, {"name": "A", "value": CANARY}]
    one["metadata"]["annotations"] = {
        "kubectl.kubernetes.io/last-applied-configuration": hidden,
        "note": f"token={CANARY}",
    }
    server.put(CORE, "pods", one)
    server.put(CORE, "secrets", {"metadata": {"name": "wandb"}, "data": {"key": hidden}})
    server.put(CORE, "configmaps", {"metadata": {"name": "run", "labels": LABELS}, "data": {"run.json": hidden}})
    about = {"kind": "Pod", "name": f"{RUN_ID}-0-aaaaa"}
    said = {
        "metadata": {"name": "e"},
        "involvedObject": about,
        "type": "Warning",
        "message": f"GET https://u:{CANARY}@host failed",
    }
    server.put(CORE, "events", said)
    server.log(f"{RUN_ID}-0-aaaaa").write(f"[a1 r0 #1] Authorization: Bearer {CANARY}")
    taken = survey(api, RUN_ID)
    text = json.dumps(taken.facts())
    assert CANARY not in text
    assert hidden not in text
    assert [one["metadata"]["name"] for one in taken.of("Secret")] == ["wandb"], "its name is in it"
    assert "PLAIN" in text


def test_what_may_not_be_read_is_said_and_the_rest_is_there(server: FakeApi, api: Api) -> None:
    server.denied |= {
        ("list", "nodes"),
        ("list", "secrets"),
        ("get", "secrets"),
        ("list", "pods of all"),
        ("list", "services"),
    }
    server.put(CORE, "services", {"metadata": {"name": RUN_ID}})
    taken = survey(api, RUN_ID)
    assert taken.unread("Node") == "no right to list nodes"
    assert taken.unread("Secret") == "no right to list secrets"
    assert len(taken.of("Pod")) == 2
    assert taken.limits["Pod"] == "only those of namespace default: no right to list pods of all"
    assert [one["metadata"]["name"] for one in taken.of("Service")] == [RUN_ID], "by the name that the run gives"


def test_a_server_that_hangs_costs_a_bounded_time(server: FakeApi, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = inventory.list_some

    def slow(api: Api, resource: Any, path: str) -> Any:
        if resource is inventory.NODE:
            __import__("time").sleep(3)
        return listed(api, resource, path)

    monkeypatch.setattr(inventory, "list_some", slow)
    monkeypatch.setattr(inventory, "DEADLINE_S", 0.5)
    assert survey(api, RUN_ID).unread("Node") == "no answer within 0.5 s"


def test_a_kind_with_too_many_objects_is_cut_and_that_is_said(
    server: FakeApi, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "PAGE", 1)
    monkeypatch.setattr(inventory, "MOST", 1)
    taken = survey(api, RUN_ID)
    assert (len(taken.of("Node")), taken.limits["Node"]) == (1, "only the first 1")


def test_a_snapshot_is_read_as_it_was_written(tmp_path: Path) -> None:
    taken = healthy().snapshot()
    path = write(tmp_path / "s.json", taken.facts())
    assert read_snapshot([path]) == taken


def test_lists_of_kubectl_are_a_snapshot_in_any_number_of_files(tmp_path: Path) -> None:
    world = healthy()
    no_secret(world)
    objects = [one for found in world.objects.values() for one in found if one["kind"] != "Node"]
    pods = [{key: value for key, value in one.items() if key != "kind"} for one in world.objects["Pod"]]
    others = [one for one in objects if one["kind"] != "Pod"]
    mixed = write(
        tmp_path / "a.json", {"kind": "List", "items": others}, {"kind": "PodList", "apiVersion": "v1", "items": pods}
    )
    nodes = write(tmp_path / "b.json", *world.objects["Node"])
    found = read_snapshot([mixed, nodes])
    assert (found.cluster, found.namespace, found.taken[:10]) == ("kubernetes", SPACE, "2026-01-01")
    assert explain(found).causes[0].name == "secret-missing"
    assert found.unread("ClusterQueue") == "nobody asked for ClusterQueue"


def test_events_of_the_newer_group_are_read_as_well(tmp_path: Path) -> None:
    world = healthy()
    no_secret(world)
    for one in world.objects["Event"]:
        one |= {"apiVersion": "events.k8s.io/v1", "regarding": one.pop("involvedObject"), "note": one.pop("message")}
        one["series"] = {"lastObservedTime": one.pop("lastTimestamp")}
    path = write(
        tmp_path / "a.json", {"kind": "List", "items": [one for found in world.objects.values() for one in found]}
    )
    assert explain(read_snapshot([path])).causes[0].name == "secret-missing"


def test_a_file_that_somebody_has_cut_ends_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = healthy().snapshot().facts()
    for one in facts["objects"]["Pod"]:
        del one["metadata"]
    assert main(["why", "--snapshot", str(write(tmp_path / "cut.json", facts))]) == 42
    assert "holds objects that no cluster writes (KeyError: 'metadata')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("apiVersion: v1", "no YAML"),
        ("[1]", "no object of a cluster"),
        ('{"kind": "orchestrator/snapshot", "schema": 9}', "schema = 9"),
        ('{"kind": "orchestrator/snapshot", "schema": 1, "taken": "now"}', "take it again"),
    ],
)
def test_what_is_no_snapshot_is_refused_by_name(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=word):
        read_snapshot([path])
    with pytest.raises(UserError, match="cannot be read"):
        read_snapshot([tmp_path / "none.json"])


def test_why_needs_no_cluster_where_it_has_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = healthy()
    assert main(["why", "--snapshot", str(write(tmp_path / "good.json", world.snapshot().facts()))]) == 0
    assert capsys.readouterr().out == f"run {world.run['metadata']['name']}: nothing is wrong: step 412 of 1,000\n"
    no_secret(world)
    world.missing |= {"Node": "no right to list nodes", "ResourceQuota": "no right to list quotas"}
    world.limits["Pod"] = "only those of namespace training: no right to list pods of all"
    path = write(tmp_path / "bad.json", world.snapshot().facts())
    assert main(["why", "--snapshot", str(path)]) == 42
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("starting: 0 of 2 pods run")
    assert lines[1] == "1. secret-missing: namespace training has no secret wandb, which its pods mount (2 pods)"
    assert lines[-1] == "not read: no right to read nodes, quotas"
    assert main(["why", "--snapshot", str(path), "--json"]) == 42
    facts = json.loads(capsys.readouterr().out)
    assert (facts["schema"], facts["causes"][0]["name"], facts["causes"][0]["pods"]) == (1, "secret-missing", 2)
    assert main(["why", "nothing-00000000", "--snapshot", str(path)]) == 42
    assert "ID nothing-00000000 is no run in the snapshot" in capsys.readouterr().err


@pytest.mark.slow
def test_a_snapshot_of_a_live_cluster_is_written_and_explained(
    server: FakeApi, api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.json"
    assert main(["snapshot", RUN_ID[:6], "cluster=kubernetes", "-o", str(path)]) == 0
    out = capsys.readouterr()
    assert "2 Node" in out.out
    assert "not read: RayCluster" in out.err
    assert main(["why", "--snapshot", str(path)]) == 0
    assert "nothing is wrong" in capsys.readouterr().out


def test_without_a_run_a_snapshot_is_of_the_cluster_alone(api: Api) -> None:
    alone = survey(api)
    assert (alone.run_id, len(alone.of("Node")), len(alone.of("Pod")), alone.record) == (None, 2, 3, {})
