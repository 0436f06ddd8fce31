"""The verbs on runs, against a server that keeps objects and a hand that plays the controllers."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_api import FakeApi
from objects import LABELS, RUN_ID, Object, condition, ended, event, pod, run_object, workload

from orchestrator.cluster.kubernetes import asking, lifecycle, logs, submit
from orchestrator.cluster.kubernetes.api import Api
from orchestrator.cluster.kubernetes.backend import KubernetesBackend, is_overdue, open_backend
from orchestrator.cluster.kubernetes.failures import Forbidden, NotFound
from orchestrator.cluster.kubernetes.states import Observed, state_of
from orchestrator.cluster.lines import progress_line, stack_end, stack_lines
from orchestrator.compose import compose
from orchestrator.errors import TransientError, UserError

CORE, BATCH, SETS = "/api/v1", "/apis/batch/v1", "/apis/jobset.x-k8s.io/v1alpha2"
KUEUE = "/apis/kueue.x-k8s.io/v1beta1"
FACTS = {"schema": 1, "run_id": RUN_ID, "state": "running", "attempt": 2, "world_size": 4, "step": 7, "total_steps": 40,
         "epoch": 0.5, "eta_s": 12.5, "images_per_s": 900.0, "goodput": 0.9}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "PAUSE_S", 0.01)
    monkeypatch.setattr(lifecycle, "POLL_S", 0.01)
    monkeypatch.setattr(logs, "PAUSE_S", 0.01)


@pytest.fixture
def backend(api: Api) -> KubernetesBackend:
    return KubernetesBackend(api)


def put_run(server: FakeApi, **facts: Any) -> Object:
    run = server.put(BATCH, "jobs", run_object(**facts))
    bundle = {"config": {"runs_dir": "/runs"}}
    labels = {**LABELS, "orchestrator/run": run["metadata"]["name"]}
    server.put(CORE, "configmaps", {"metadata": {"name": f"run-{run['metadata']['name']}", "labels": labels,
                                                 "ownerReferences": [{"uid": run["metadata"]["uid"]}]},
                                    "data": {"run.json": json.dumps(bundle)}})  # fmt: skip
    return run


def test_the_cluster_of_the_config_is_opened(server: FakeApi) -> None:
    config = compose(["cluster=kubernetes", "cluster.context=staging"]).config.cluster
    assert open_backend(config, Path("runs"))._api.namespace == "vision"


def test_runs_of_all_kinds_are_listed_by_one_call_each(server: FakeApi, backend: KubernetesBackend) -> None:
    put_run(server, name="a-1", status={"conditions": [condition("Complete")]})
    server.put(SETS, "jobsets", run_object("JobSet", name="b-2", suspend=True))
    child = run_object(name="b-2-node-0")
    child["metadata"]["ownerReferences"] = [{"kind": "JobSet", "uid": "u", "controller": True}]
    server.put(BATCH, "jobs", child)
    server.put(BATCH, "jobs", {"metadata": {"name": "somebody-elses"}})
    server.calls.clear()
    assert [(run["run_id"], run["kind"], run["state"], run["exit_code"]) for run in backend.runs()] == [
        ("a-1", "Job", "done", 0), ("b-2", "JobSet", "stopped", 45)
    ]  # fmt: skip
    assert len(server.calls) == 4
    assert backend.ids() == ["a-1", "b-2"]


def test_the_job_that_kuberay_makes_under_the_name_of_its_run_is_not_taken_for_somebody_elses(
    server: FakeApi, backend: KubernetesBackend
) -> None:
    submitter = {"metadata": {"name": "a-1", "ownerReferences": [{"kind": "RayJob", "uid": "u", "controller": True}]}}
    server.put(BATCH, "jobs", submitter)
    server.put("/apis/ray.io/v1", "rayjobs", run_object("RayJob", name="a-1"))
    assert backend.status("a-1")["kind"] == "RayJob"


def test_a_cluster_with_jobs_alone_lists_them(server: FakeApi, backend: KubernetesBackend) -> None:
    for api in (SETS, "/apis/trainer.kubeflow.org/v1alpha1", "/apis/ray.io/v1"):
        del server.served[api]
    put_run(server)
    assert backend.ids() == [RUN_ID]


def test_kinds_that_may_not_be_read_are_told_of_and_none_at_all_is_an_error(
    server: FakeApi, backend: KubernetesBackend, caplog: pytest.LogCaptureFixture
) -> None:
    put_run(server)
    server.denied = {("list", kind) for kind in ("jobsets", "rayjobs")}
    assert backend.ids() == [RUN_ID]
    assert caplog.messages == [
        "runs that are jobsets, rayjobs are not shown: no right to list jobsets, rayjobs in default"
    ]
    server.denied.add(("list", "trainjobs"))
    server.denied.add(("list", "jobs"))
    with pytest.raises(Forbidden, match="no right to list jobs"):
        backend.ids()


def test_a_run_that_may_be_of_a_kind_without_a_right_is_not_said_to_be_missing(
    server: FakeApi, backend: KubernetesBackend
) -> None:
    put_run(server)
    server.denied = {("get", "jobs")}
    with pytest.raises(Forbidden, match="no right to get jobs"):
        backend.status(RUN_ID)


def test_a_thousand_runs_are_listed_quickly(server: FakeApi, backend: KubernetesBackend) -> None:
    for number in range(1000):
        server.put(BATCH, "jobs", run_object(name=f"run-{number:04}", status={"ready": 2}))
    began = time.perf_counter()
    assert len(backend.runs()) == 1000
    assert time.perf_counter() - began < 5


def test_status_needs_no_pod_that_goes_while_it_is_asked(
    server: FakeApi, backend: KubernetesBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a set makes its pods anew."""
    put_run(server)
    server.put(CORE, "pods", pod(0))

    def gone(*_: object, **__: object) -> None:
        raise NotFound("pods/log: not found")

    monkeypatch.setattr(Api, "stream", gone)
    assert backend.status(RUN_ID)["step"] is None


def test_status_joins_objects_pods_and_the_newest_progress(server: FakeApi, backend: KubernetesBackend) -> None:
    put_run(server, status={"failed": 2})
    server.put(CORE, "pods", pod(0))
    server.put(CORE, "pods", pod(1, node="rig-b"))
    log = server.log(f"{RUN_ID}-0-aaaaa")
    log.write(progress_line(2, 0, {**FACTS, "step": 6}).rstrip(), progress_line(2, 0, FACTS).rstrip())
    log.write(*(f"[a2 r0 #{number}] chatter" for number in range(1, 300)))
    facts = backend.status(RUN_ID)
    expected = {"run_id": RUN_ID, "state": "running", "exit_code": None, "attempt": 2, "step": 7, "total_steps": 40,
                "images_per_s": 900.0, "eta_s": 12.5, "nodes": ["rig-a", "rig-b"], "restarts": 1}  # fmt: skip
    assert {key: facts[key] for key in expected} == expected
    assert facts["where"] == [
        f"Job {RUN_ID} in default of test", f"Pod {RUN_ID}-0-aaaaa on rig-a (Running)",
        f"Pod {RUN_ID}-1-aaaaa on rig-b (Running)",
    ]  # fmt: skip


def test_status_names_what_holds_a_run_up(server: FakeApi, backend: KubernetesBackend) -> None:
    put_run(server)
    said = event("FailedCreate", "exceeded quota: team")
    server.put(CORE, "events", said)
    server.put(CORE, "events", event("BackOff", "another run's", "11:00", name="other"))
    assert backend.status(RUN_ID)["reason"] == f"{RUN_ID}: FailedCreate: exceeded quota: team"
    server.denied = {("list", "events")}
    assert backend.status(RUN_ID)["reason"] == "not checked: no right to list events"


def test_a_run_and_its_cluster_that_disagree_are_both_quoted(server: FakeApi, backend: KubernetesBackend) -> None:
    put_run(server, status={"conditions": [condition("Failed", "DeadlineExceeded", "too long")]})
    server.put(CORE, "pods", pod(0, "Succeeded", state={"terminated": {"exitCode": 0}}))
    server.log(f"{RUN_ID}-0-aaaaa").write(progress_line(2, 0, {**FACTS, "state": "done"}).rstrip())
    facts = backend.status(RUN_ID)
    assert (facts["state"], facts["eta_s"]) == ("failed", None)
    assert facts["reason"] == "DeadlineExceeded: too long; the run itself said that it is done"


def test_a_run_whose_node_does_not_answer_has_a_status_and_the_logs_of_the_others(
    server: FakeApi, backend: KubernetesBackend, caplog: pytest.LogCaptureFixture
) -> None:
    put_run(server)
    for index in (0, 1):
        server.put(CORE, "pods", pod(index))
        server.log(f"{RUN_ID}-{index}-aaaaa").write(f"[a1 r{index} #1] here")
    server.lost_pods = {f"{RUN_ID}-0-aaaaa"}
    facts = backend.status(RUN_ID)
    assert (facts["state"], facts["step"]) == ("running", None)
    assert f"the last words of {RUN_ID}-0-aaaaa are not known: " in caplog.text
    assert [line.text for line in backend.logs(RUN_ID, False, None)] == ["here"]
    assert f"log of {RUN_ID}-0-aaaaa: " in caplog.text
    assert [one["lines"] for one in backend.snapshot(RUN_ID).record["lines"]] == [["here"]]
    assert "connection refused" in caplog.text


def test_an_unknown_id_gets_the_nearest_one(backend: KubernetesBackend, server: FakeApi) -> None:
    put_run(server)
    with pytest.raises(UserError, match=rf"ID digits-0123 is no run in namespace default of test: did you.*{RUN_ID}"):
        backend.status("digits-0123")
    with pytest.raises(UserError, match="is no run"):
        backend.logs("digits-0123", False, None)


def test_cancel_suspends_and_waits_until_the_pods_are_gone(
    server: FakeApi, backend: KubernetesBackend, caplog: pytest.LogCaptureFixture
) -> None:
    put_run(server)
    server.put(CORE, "pods", pod(0))
    threading.Timer(0.1, server.remove, (CORE, "pods", f"{RUN_ID}-0-aaaaa")).start()
    with caplog.at_level("INFO"):
        backend.cancel(RUN_ID, now=False)
    assert server.names("pods") == []
    assert "1 pods are saving, for at most 30 s" in caplog.text
    assert backend.status(RUN_ID)["state"] == "stopped"
    backend.resume(RUN_ID)
    assert backend.status(RUN_ID)["state"] == "starting"
    assert "orchestrator/stopped" not in server.objects[BATCH, "default", "jobs", RUN_ID]["metadata"]["annotations"]


def test_cancel_now_kills_the_pods(server: FakeApi, backend: KubernetesBackend) -> None:
    put_run(server)
    server.put(CORE, "pods", pod(0))
    backend.cancel(RUN_ID, now=True)
    assert server.names("pods") == []


def test_cancel_waits_for_pods_that_come_before_the_controller_takes_note(
    server: FakeApi, backend: KubernetesBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "NOTED_S", 30.0)
    put_run(server, queue="team")
    server.put(KUEUE, "workloads", workload())

    def late(run: str) -> None:
        server.put(CORE, "pods", pod(0, "Pending"))
        server.change(BATCH, "jobs", run, status={"conditions": [condition("Suspended")]})

    threading.Timer(0.1, late, (RUN_ID,)).start()
    threading.Timer(0.4, server.remove, (CORE, "pods", f"{RUN_ID}-0-aaaaa")).start()
    backend.cancel(RUN_ID, now=False)
    assert ("DELETED", f"{RUN_ID}-0-aaaaa") in [(kind, key[3]) for _, kind, key, _ in server.history]
    assert backend.status(RUN_ID)["state"] == "stopped"


def test_pods_that_do_not_go_are_named(
    server: FakeApi, backend: KubernetesBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "MARGIN_S", -29.9)
    put_run(server)
    server.put(CORE, "pods", pod(0))
    with pytest.raises(TransientError, match=rf"pods of {RUN_ID}: still there.*Way out: look at its node"):
        backend.cancel(RUN_ID, now=False)


def test_a_queued_run_is_stopped_at_its_workload(server: FakeApi, backend: KubernetesBackend) -> None:
    put_run(server, queue="team")
    record = server.put(KUEUE, "workloads", workload())
    name = record["metadata"]["name"]
    backend.cancel(RUN_ID, now=False)
    assert server.objects[KUEUE, "default", "workloads", name]["spec"]["active"] is False
    assert server.objects[BATCH, "default", "jobs", RUN_ID]["spec"]["suspend"] is False
    assert backend.status(RUN_ID)["state"] == "stopped"
    backend.resume(RUN_ID)
    assert server.objects[KUEUE, "default", "workloads", name]["spec"]["active"] is True


def test_a_run_that_its_queue_has_not_noted_yet_is_stopped_there_as_well(
    server: FakeApi, backend: KubernetesBackend
) -> None:
    put_run(server, queue="team", suspend=True)
    threading.Timer(0.05, server.put, (KUEUE, "workloads", workload())).start()
    backend.cancel(RUN_ID, now=False)
    (record,) = [obj for key, obj in server.objects.items() if key[2] == "workloads"]
    assert record["spec"]["active"] is False


def test_a_queued_run_is_not_stopped_without_a_right_to_its_workload(
    server: FakeApi, backend: KubernetesBackend
) -> None:
    put_run(server, queue="team")
    server.denied = {("list", "workloads")}
    with pytest.raises(Forbidden, match="no right to list workloads"):
        backend.cancel(RUN_ID, now=False)


def test_a_queued_run_that_cannot_be_stopped_is_not_marked_as_stopped(
    server: FakeApi, backend: KubernetesBackend
) -> None:
    put_run(server, queue="team")
    server.put(KUEUE, "workloads", workload())
    server.denied = {("patch", "workloads")}
    with pytest.raises(Forbidden, match="no right to patch workloads"):
        backend.cancel(RUN_ID, now=False)
    assert "orchestrator/stopped" not in server.objects[BATCH, "default", "jobs", RUN_ID]["metadata"]["annotations"]


def test_a_stopped_run_of_a_queue_is_not_said_to_go_on_without_a_right_to_its_workload(
    server: FakeApi, backend: KubernetesBackend
) -> None:
    put_run(server, queue="team", suspend=True, orchestrator__stopped="2026-01-01T10:00:00+00:00")
    server.put(KUEUE, "workloads", workload(active=False))
    server.denied = {("list", "workloads")}
    with pytest.raises(Forbidden, match="no right to list workloads"):
        backend.resume(RUN_ID)


def test_what_a_queue_says_is_told_or_that_it_may_not_be_read(server: FakeApi, backend: KubernetesBackend) -> None:
    put_run(server, queue="team", suspend=True)
    waits = "waits until queue team admits it"
    assert backend.status(RUN_ID)["reason"] == waits
    server.denied = {("list", "workloads")}
    assert backend.status(RUN_ID)["reason"] == f"{waits}; not checked: no right to list workloads"


def test_what_has_ended_is_neither_cancelled_nor_resumed_when_done(server: FakeApi, backend: KubernetesBackend) -> None:
    put_run(server, status={"conditions": [condition("Complete")]})
    with pytest.raises(UserError, match="has ended: done"):
        backend.cancel(RUN_ID, now=False)
    with pytest.raises(UserError, match="is done"):
        backend.resume(RUN_ID)


def test_a_failed_run_is_resumed_from_its_own_objects(server: FakeApi, backend: KubernetesBackend) -> None:
    old = put_run(server, status={"conditions": [condition("Failed", "BackoffLimitExceeded")]})
    server.put(CORE, "pods", pod(0, "Failed", state=ended(43)))
    backend.resume(RUN_ID)
    new = server.objects[BATCH, "default", "jobs", RUN_ID]
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    assert (new["spec"]["suspend"], new["spec"]["template"]) == (False, old["spec"]["template"])
    assert "Failed" not in str(new.get("status"))
    assert f"run-{RUN_ID}" in server.names("configmaps")


@pytest.mark.parametrize(
    ("verb", "resource"),
    [("create", "jobs"), ("patch", "jobs"), ("create", "networkpolicies"), ("delete", "jobs")],
)
def test_a_failed_run_that_cannot_be_sent_again_is_still_there(
    server: FakeApi, backend: KubernetesBackend, verb: str, resource: str
) -> None:
    old = put_run(server, status={"conditions": [condition("Failed", "BackoffLimitExceeded")]})
    policy = {"metadata": {"name": RUN_ID, "labels": LABELS, "ownerReferences": [{"uid": old["metadata"]["uid"]}]}}
    server.put("/apis/networking.k8s.io/v1", "networkpolicies", policy)
    server.denied = {(verb, resource)}
    with pytest.raises(Forbidden, match=f"no right to {verb} {resource}"):
        backend.resume(RUN_ID)
    assert server.objects[BATCH, "default", "jobs", RUN_ID] == old
    assert f"run-{RUN_ID}" in server.names("configmaps")


def test_a_living_run_is_not_removed(server: FakeApi, backend: KubernetesBackend) -> None:
    put_run(server)
    with pytest.raises(UserError, match=rf"is starting. Way out: orchestrator cancel {RUN_ID}"):
        backend.remove(RUN_ID)


def test_code_is_removed_with_the_last_run_that_has_it(server: FakeApi, backend: KubernetesBackend) -> None:
    over = {"conditions": [condition("Complete")]}
    for name in ("a-1", "b-2"):
        put_run(server, name=name, status=over, orchestrator__archive="0123456789abcdef")
    server.put(CORE, "configmaps", {"metadata": {"name": "code-0123456789ab"}})
    backend.remove("a-1")
    assert server.names("configmaps") == ["code-0123456789ab", "run-b-2"]
    backend.remove("b-2")
    assert server.names("configmaps") == []


def test_code_stays_where_runs_that_may_have_it_are_not_seen(server: FakeApi, backend: KubernetesBackend) -> None:
    put_run(server, status={"conditions": [condition("Complete")]}, orchestrator__archive="0123456789abcdef")
    server.put(CORE, "configmaps", {"metadata": {"name": "code-0123456789ab"}})
    server.denied = {("list", "rayjobs")}
    backend.remove(RUN_ID)
    assert server.names("configmaps") == ["code-0123456789ab"]


def test_every_rank_answers_where_it_is(server: FakeApi, backend: KubernetesBackend) -> None:
    put_run(server)

    def launcher(kind: str, changed: Object) -> None:
        ask = changed["metadata"].get("annotations", {}).get("orchestrator/ask")
        if changed.get("kind") == "Pod" and ask:
            node = int(changed["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])
            log = server.log(changed["metadata"]["name"])
            log.write(*stack_lines("stack-1", 1, node, ["an earlier answer"]).splitlines())
            log.write(*stack_lines(ask, 1, node, [f"a.py:{node} in f", "b.py:2 in g"]).splitlines())
            log.write(stack_end(ask, 1, node, [node]).rstrip())

    server.after.append(launcher)
    for index in (0, 1):
        server.put(CORE, "pods", pod(index))
    server.put(CORE, "pods", pod(2, "Pending"))
    assert backend.stacks(RUN_ID) == {0: "a.py:0 in f\nb.py:2 in g", 1: "a.py:1 in f\nb.py:2 in g"}


def test_ranks_that_do_not_answer_are_warned_of(
    server: FakeApi, backend: KubernetesBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asking, "ANSWER_S", 0.2)
    put_run(server)
    server.put(CORE, "pods", pod(0))
    assert backend.stacks(RUN_ID) == {}
    assert "1 of 1 pods did not answer" in caplog.text


@pytest.mark.parametrize("right", [("get", "pods"), ("get", "pods/log"), ("patch", "pods")])
def test_a_right_that_lacks_to_hear_the_answers_is_an_error(
    server: FakeApi, backend: KubernetesBackend, right: tuple[str, str]
) -> None:
    put_run(server)
    server.put(CORE, "pods", pod(0))
    server.denied = {right}
    with pytest.raises(Forbidden, match=f"no right to {right[0]} {right[1]} in it"):
        backend.stacks(RUN_ID)


def test_logs_are_followed_until_the_run_ends(server: FakeApi, backend: KubernetesBackend) -> None:
    put_run(server)
    server.put(CORE, "pods", pod(0))
    log = server.log(f"{RUN_ID}-0-aaaaa")
    log.write("[a1 r0 #1] one")
    lines = backend.logs(RUN_ID, True, None)
    assert next(lines).text == "one"
    log.write("[a1 r0 #2] two")
    log.end()
    server.put(CORE, "pods", pod(0, "Succeeded", state={"terminated": {"exitCode": 0}}))
    server.change(BATCH, "jobs", RUN_ID, status={"conditions": [condition("Complete")]})
    assert [line.text for line in lines] == ["two"]
    assert [line.text for line in backend.logs(RUN_ID, False, 0)] == ["one", "two"]


NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("hours", "status", "pods", "overdue"),
    [
        (25, {}, [], True),
        (23, {}, [], False),
        (25, {"startTime": "2026-01-01T23:00:00Z"}, [], False),
        (25, {"conditions": [{"type": "Suspended", "status": "False", "lastTransitionTime": "2026-01-01T23:00:00Z"}]},
         [], False),
        (25, {}, [pod(0, "Pending")], True),
        (25, {}, [pod(0, "Failed", state=ended(75)), pod(0, "Pending", suffix="b")], False),
        (25, {"restarts": 1}, [], False),
    ],
)  # fmt: skip
def test_a_run_that_never_started_is_overdue(hours: int, status: Object, pods: list[Object], overdue: bool) -> None:
    run = run_object("JobSet", status=status, **{"orchestrator/start-deadline-s": "86400"})
    run["metadata"]["creationTimestamp"] = (NOW - timedelta(hours=hours)).isoformat()
    seen = Observed(run, pods)
    assert is_overdue(seen, state_of(seen), NOW) is overdue


def test_whoever_looks_ends_a_run_that_never_started(server: FakeApi, backend: KubernetesBackend) -> None:
    run = run_object(**{"orchestrator/start-deadline-s": "60"})
    run["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    server.put(BATCH, "jobs", run)
    server.put(CORE, "pods", pod(0, "Pending", state={"waiting": {"reason": "ImagePullBackOff", "message": "no such"}}))
    facts = backend.status(RUN_ID)
    assert facts["state"] == "stopped"
    assert facts["reason"].startswith("did not start within cluster.start_deadline_s: node 0")
    assert server.objects[BATCH, "default", "jobs", RUN_ID]["spec"]["suspend"] is True
