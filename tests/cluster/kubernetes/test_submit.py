"""Sending a run: all or nothing, once, whoever sends it how often."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from fake_api import FakeApi
from objects import condition, ended, pod
from profiles import ARCHIVE, RUN, profile

from orchestrator.cluster.job import JobSpec
from orchestrator.cluster.kubernetes import lifecycle, submit
from orchestrator.cluster.kubernetes.api import Api, connect
from orchestrator.cluster.kubernetes.failures import Forbidden, Refused
from orchestrator.cluster.kubernetes.lifecycle import erase, objects_of, suspend
from orchestrator.cluster.kubernetes.render import render
from orchestrator.cluster.kubernetes.runs import get_run
from orchestrator.cluster.kubernetes.submit import choose_kind
from orchestrator.errors import ConfigError, TransientError, UserError
from orchestrator.options import JobKind

CORE, BATCH, SETS = "/api/v1", "/apis/batch/v1", "/apis/jobset.x-k8s.io/v1alpha2"
TRAINER, KUEUE = "/apis/trainer.kubeflow.org/v1alpha1", "/apis/kueue.x-k8s.io/v1beta1"
CODE = f"code-{ARCHIVE[:12]}"
RESTRICTED = 'would violate PodSecurity "restricted:latest": runAsNonRoot != true'


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "PAUSE_S", 0.01)
    monkeypatch.setattr(lifecycle, "POLL_S", 0.01)


@pytest.fixture
def spec(server: FakeApi) -> JobSpec:
    """With all that it refers to in the cluster."""
    for claim, modes in (("work", ["ReadWriteMany"]), ("data", ["ReadOnlyMany"])):
        server.put(CORE, "persistentvolumeclaims", {"metadata": {"name": claim}, "spec": {"accessModes": modes}})
    for secret in ("wandb", "store", "registry"):
        server.put(CORE, "secrets", {"metadata": {"name": secret}, "data": {"k": "c2VjcmV0"}})
    server.put(CORE, "serviceaccounts", {"metadata": {"name": "runner"}})
    server.put("/apis/scheduling.k8s.io/v1", "priorityclasses", {"metadata": {"name": "batch"}}, namespace="")
    return profile("archive_secrets_volumes")


def send(api: Api, spec: JobSpec, kind: JobKind = JobKind.job) -> submit.Submission:
    return submit.submit(api, replace(spec, kind=kind), b"the archive")


def left(server: FakeApi) -> list[str]:
    """What a submission could leave behind."""
    return [name for plural in ("configmaps", "services", "networkpolicies", "jobs", "jobsets", "trainjobs",
                                "trainingruntimes", "rayjobs") for name in server.names(plural)]  # fmt: skip


@pytest.mark.parametrize("kind", [JobKind.job, JobKind.jobset, JobKind.trainjob, JobKind.rayjob])
def test_what_is_sent_is_what_is_rendered_and_belongs_to_the_run(
    server: FakeApi, api: Api, spec: JobSpec, kind: JobKind
) -> None:
    came = send(api, spec, kind)
    assert (came.outcome, came.why, came.state.state) == ("submitted", "cluster.kind names it", "starting")
    run = get_run(api, RUN)
    assert run.run["spec"]["suspend"] is False
    sent = [(obj["kind"], obj["metadata"]["name"]) for obj in render(replace(spec, kind=kind), kind, b"the archive")]
    assert sorted(name for _, name in sent) == sorted(left(server))
    for (_, _, plural, name), obj in server.objects.items():
        if plural in ("configmaps", "services", "networkpolicies") and name != CODE:
            assert [owner["uid"] for owner in obj["metadata"]["ownerReferences"]] == [run.uid]
    erase(api, run)
    assert left(server) == [CODE]


def test_nothing_starts_before_everything_is_there(server: FakeApi, api: Api, spec: JobSpec) -> None:
    seen = []
    server.after.append(
        lambda kind, obj: seen.append((obj["kind"], obj["spec"].get("suspend") if "spec" in obj else None))
    )
    send(api, spec)
    assert seen[0] == ("Job", True)
    assert seen[-1] == ("Job", False)


def test_auto_takes_the_best_and_says_why(server: FakeApi, api: Api) -> None:
    assert choose_kind(api, JobKind.auto) == (
        JobKind.jobset, "it starts all nodes again together, and the cluster serves it"
    )  # fmt: skip
    server.denied = {("create", "jobsets")}
    assert choose_kind(api, JobKind.auto) == (JobKind.job, "there is no right to create jobsets")
    del server.served[SETS]
    assert choose_kind(api, JobKind.auto) == (JobKind.job, "the cluster serves no jobsets")


def test_a_kind_that_is_not_served_is_refused_with_those_that_are(server: FakeApi, api: Api, spec: JobSpec) -> None:
    del server.served["/apis/ray.io/v1"]
    with pytest.raises(ConfigError, match=r"cluster.kind = rayjob: .*rayjobs of ray.io/v1. Way out: one of: auto, job"):
        send(api, spec, JobKind.rayjob)


def test_sending_a_living_run_again_finds_it(server: FakeApi, api: Api, spec: JobSpec) -> None:
    send(api, spec)
    server.calls.clear()
    came = send(api, spec, JobKind.jobset)  # `auto` may take another kind the next time
    assert (came.outcome, came.kind, came.state.state) == ("there", "Job", "starting")
    assert not [call for call in server.calls if call[0] != "GET"]


def test_another_bundle_under_a_living_id_is_refused(server: FakeApi, api: Api, spec: JobSpec) -> None:
    send(api, spec)
    other = replace(spec, code_digest="d" * 64, bundle={**spec.bundle, "config_hash": "e" * 64})
    with pytest.raises(ConfigError, match=rf"run_id = {RUN}: is under way with another config and code. Way out: orch"):
        send(api, other)


def test_a_stopped_run_goes_on_when_it_is_sent_again(server: FakeApi, api: Api, spec: JobSpec) -> None:
    send(api, spec)
    suspend(api, get_run(api, RUN), now=False)
    uid = get_run(api, RUN).uid
    came = send(api, spec)
    assert (came.outcome, came.state.state) == ("resumed", "starting")
    assert get_run(api, RUN).uid == uid


@pytest.mark.parametrize("change", [{}, {"max_restarts": 9}])
def test_a_failed_run_starts_again_under_its_name(
    server: FakeApi, api: Api, spec: JobSpec, change: dict[str, int]
) -> None:
    send(api, spec)
    uid = get_run(api, RUN).uid
    server.change(BATCH, "jobs", RUN, status={"conditions": [condition("Failed", "BackoffLimitExceeded")]})
    came = send(api, replace(spec, **change))
    assert (came.outcome, came.state.state) == ("restarted", "starting")
    run = get_run(api, RUN)
    assert run.uid != uid
    assert [owner["uid"] for owner in server.objects[CORE, "default", "configmaps", f"run-{RUN}"]["metadata"][
        "ownerReferences"]] == [run.uid]  # fmt: skip


def test_a_run_that_found_a_node_unfit_avoids_it(server: FakeApi, api: Api, spec: JobSpec) -> None:
    send(api, spec)
    server.put(CORE, "pods", pod(0, "Failed", name=RUN, node="rig-b", state=ended(44, "the GPU is lost")))
    server.change(BATCH, "jobs", RUN, status={"conditions": [condition("Failed", "BackoffLimitExceeded")]})
    came = send(api, spec)
    assert came.outcome == "restarted"
    assert "avoids rig-b, which a launcher found unfit" in came.notes
    assert "'values': ['rig-b']" in str(get_run(api, RUN).run["spec"]["template"]["spec"]["affinity"])


def test_a_run_that_is_done_is_not_started_again(server: FakeApi, api: Api, spec: JobSpec) -> None:
    send(api, spec)
    server.change(BATCH, "jobs", RUN, status={"conditions": [condition("Complete")]})
    came = send(api, spec)
    assert (came.outcome, came.state.state) == ("there", "done")


def test_a_removed_run_starts_again_though_its_parts_are_still_being_collected(
    server: FakeApi, api: Api, spec: JobSpec
) -> None:
    old = {"name": f"run-{RUN}", "labels": {}, "ownerReferences": [{"uid": "gone"}]}
    server.put(CORE, "configmaps", {"metadata": old, "data": {"run.json": "old"}})
    assert send(api, spec).outcome == "submitted"
    assert api.get(lifecycle.CONFIG_MAP, f"run-{RUN}")["data"]["run.json"] != "old"


@pytest.mark.parametrize("refused", ["ConfigMap", "Service", "NetworkPolicy", "Job"])
def test_a_refusal_in_the_middle_leaves_nothing(server: FakeApi, api: Api, spec: JobSpec, refused: str) -> None:
    server.admission = [lambda verb, obj: "exceeded quota: team" if obj["kind"] == refused else None]
    with pytest.raises(Refused, match="exceeded quota: team"):
        send(api, spec)
    assert left(server) == []


@pytest.mark.parametrize(("unseen", "sent"), [(3, True), (10**6, False)])
def test_a_runtime_that_its_operator_has_not_seen_yet_is_waited_for(
    server: FakeApi, api: Api, spec: JobSpec, unseen: int, sent: bool
) -> None:
    refusals = iter(range(unseen))
    said = "not found: specified trainingRuntime must be created before the TrainJob is created"
    server.admission = [lambda verb, obj: said if obj["kind"] == "TrainJob" and next(refusals, -1) >= 0 else None]
    if sent:
        assert send(api, spec, JobKind.trainjob).outcome == "submitted"
        return
    with pytest.raises(Refused, match="must be created before"):
        send(api, spec, JobKind.trainjob)
    assert left(server) == []


def test_a_refusal_keeps_what_was_there_before(server: FakeApi, api: Api, spec: JobSpec) -> None:
    server.put(CORE, "configmaps", {"metadata": {"name": CODE, "labels": {}}, "binaryData": {}})
    server.admission = [lambda verb, obj: "no" if obj["kind"] == "Service" else None]
    with pytest.raises(Refused):
        send(api, spec)
    assert left(server) == [CODE]


def test_a_server_that_dies_in_the_middle_is_transient(server: FakeApi, api: Api, spec: JobSpec) -> None:
    server.faults = [(f"POST {CORE}/namespaces/default/services", "reset")] * 3
    with pytest.raises(TransientError):
        send(api, spec)
    assert left(server) == []


def test_pods_that_the_namespace_would_refuse_are_not_sent(server: FakeApi, api: Api, spec: JobSpec) -> None:
    server.warnings = [RESTRICTED]
    with pytest.raises(Refused, match="PodSecurity"):
        send(api, spec)
    assert left(server) == []


def test_a_lost_answer_to_a_creation_is_no_other_submitter(server: FakeApi, api: Api, spec: JobSpec) -> None:
    path = f"POST {BATCH}/namespaces/default/jobs"
    server.lost = [path]
    came = send(api, spec)
    assert (came.outcome, server.lost) == ("submitted", [])


def test_of_two_submitters_at_once_one_wins_and_the_other_says_so(server: FakeApi, spec: JobSpec) -> None:
    came: list[submit.Submission] = []
    threads = [threading.Thread(target=lambda: came.append(send(connect(), spec))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcomes = sorted(one.outcome for one in came)
    assert len(came) == 6
    assert outcomes.count("submitted") == 1
    assert set(outcomes) <= {"submitted", "there", "resumed"}
    assert get_run(connect(), RUN).run["spec"]["suspend"] is False
    assert sorted(left(server)) == sorted([RUN, RUN, RUN, CODE, f"run-{RUN}"])


def test_a_submitter_that_was_killed_half_way_is_completed_by_the_next(
    server: FakeApi, api: Api, spec: JobSpec
) -> None:
    *_, job = render(spec, JobKind.job, b"")
    api.create({**job, "spec": {**job["spec"], "suspend": True}})
    came = send(api, spec)
    assert came.outcome == "resumed"
    assert f"run-{RUN}" in left(server)


def test_a_run_that_is_being_sent_with_another_bundle_is_left_alone(server: FakeApi, api: Api, spec: JobSpec) -> None:
    *_, job = render(spec, JobKind.job, b"")
    job = {**job, "spec": {**job["spec"], "suspend": True}}
    server.put(BATCH, "jobs", job)
    other = replace(spec, code_digest="d" * 64)
    with pytest.raises(ConfigError, match="is under way with another code"):
        send(api, other)
    old = {**job["metadata"], "creationTimestamp": "2020-01-01T00:00:00Z"}
    server.put(BATCH, "jobs", {**job, "metadata": old})
    assert send(api, other).outcome == "restarted"


def test_of_two_who_start_a_failed_run_again_one_wins(server: FakeApi, api: Api, spec: JobSpec) -> None:
    send(api, spec)
    server.change(BATCH, "jobs", RUN, status={"conditions": [condition("Failed", "BackoffLimitExceeded")]})
    seen = get_run(api, RUN)
    assert send(api, spec).outcome == "restarted"
    server.put(CORE, "pods", pod(0, name=RUN))
    erase(api, seen)
    assert get_run(api, RUN).uid != seen.uid


def test_an_object_of_somebody_else_is_left_alone(server: FakeApi, api: Api, spec: JobSpec) -> None:
    server.put(BATCH, "jobs", {"metadata": {"name": RUN}, "spec": {}})
    with pytest.raises(UserError, match=rf"Job {RUN} in namespace default is not orchestrator's"):
        send(api, spec)


@pytest.mark.parametrize(
    ("plural", "name", "words"),
    [
        (
            "persistentvolumeclaims",
            "work",
            r"cluster.volumes = work: namespace default has no such Persistent.*one of: data",
        ),
        ("secrets", "wandb", r"tracking.secret = wandb: namespace default has no such Secret"),
        ("secrets", "store", r"cluster.store_secret = store: "),
        ("secrets", "registry", r"cluster.pull_secrets = registry: "),
        ("serviceaccounts", "runner", r"cluster.service_account = runner: "),
    ],
)
def test_what_the_config_names_must_be_there(
    server: FakeApi, api: Api, spec: JobSpec, plural: str, name: str, words: str
) -> None:
    server.remove(CORE, plural, name)
    with pytest.raises(ConfigError, match=words):
        send(api, spec)
    assert left(server) == []


def test_a_claim_must_let_several_nodes_write(server: FakeApi, api: Api, spec: JobSpec) -> None:
    server.change(CORE, "persistentvolumeclaims", "work", spec={"accessModes": ["ReadWriteOnce"]})
    with pytest.raises(ConfigError, match=r"cluster.volumes = work: several nodes write there.*only ReadWriteOnce"):
        send(api, spec)


def test_a_queue_must_be_there(server: FakeApi, api: Api, spec: JobSpec) -> None:
    queued = replace(spec, queue="taem", priority=None)
    server.put(KUEUE, "localqueues", {"metadata": {"name": "team"}})
    with pytest.raises(ConfigError, match=r"cluster.queue = taem: .*did you mean 'team'\?"):
        send(api, queued)
    del server.served[KUEUE]
    with pytest.raises(ConfigError, match=r"cluster.queue = taem: .*Kueue is not installed"):
        send(api, queued)


def test_what_may_not_be_read_is_said_to_be_unchecked(server: FakeApi, api: Api, spec: JobSpec) -> None:
    server.denied = {("get", "secrets"), ("get", "priorityclasses")}
    notes = send(api, spec).notes
    assert "tracking.secret = wandb: not checked: no right to get secrets" in notes
    assert "cluster.priority = batch: not checked: no right to get priorityclasses" in notes


def test_no_secret_is_ever_read(server: FakeApi, api: Api, spec: JobSpec) -> None:
    send(api, spec)
    for (_, path), accept in zip(server.calls, server.accepted, strict=True):
        assert "/secrets/" not in path or "PartialObjectMetadata" in accept


def test_a_run_in_a_queue_waits_for_it(server: FakeApi, api: Api, spec: JobSpec) -> None:
    server.put(KUEUE, "localqueues", {"metadata": {"name": "team"}})
    came = send(api, replace(spec, queue="team", priority=None))
    assert (came.state.state, came.state.reason) == ("queued", "waits until queue team admits it")
    assert get_run(api, RUN).run["spec"]["suspend"] is True


def test_a_missing_right_leaves_nothing(server: FakeApi, api: Api, spec: JobSpec) -> None:
    server.denied = {("create", "services")}
    with pytest.raises(Forbidden, match="no right to create services"):
        send(api, spec)
    assert left(server) == []


def test_what_was_read_back_can_be_sent_again(server: FakeApi, api: Api, spec: JobSpec) -> None:
    send(api, spec)
    job = server.objects[BATCH, "default", "jobs", RUN]
    job["spec"]["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": "u"}}
    job["spec"]["template"]["metadata"]["labels"]["job-name"] = RUN
    job["status"] = {"failed": 3}
    rendered = render(spec, JobKind.job, b"the archive")[1:]
    by_kind = {obj["kind"]: obj for obj in objects_of(api, get_run(api, RUN))}
    for obj in rendered:
        read = by_kind[obj["kind"]]
        read["metadata"] = {k: v for k, v in read["metadata"].items() if v}
        if obj["kind"] == "Job":
            read["spec"]["suspend"] = obj["spec"].get("suspend")
        assert read == obj


def test_a_run_that_ends_is_waited_for(server: FakeApi, api: Api, spec: JobSpec) -> None:
    send(api, spec)
    server.put(CORE, "pods", pod(0, name=RUN))
    threading.Timer(0.1, server.remove, (CORE, "pods", f"{RUN}-0-aaaaa")).start()
    suspend(api, get_run(api, RUN), now=False)
    assert server.names("pods") == []
