"""A snapshot of a Ray cluster, taken over HTTP from a dashboard that answers as the real one does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "ray"))

from fake_ray import FakeRay, serving

from orchestrator.cluster.ray.api import Dashboard, Token
from orchestrator.cluster.ray.survey import survey
from orchestrator.cluster.why.verdict import explain

RUN = "digits-0123abcd"
META = {"orchestrator/run": RUN, "orchestrator/folder": "/nowhere/digits-0123abcd"}
WAITS = "[a0 n0 #3] waits for its workers: 4 x (1 CPU, 1 GPU), any; the cluster has 2 of 8 CPU, 0 of 8 GPU free"
CANARY = "rAy.t0ken-Canary1"


def dashboard(ray: FakeRay) -> Dashboard:
    return Dashboard(ray.address, Token(str(ray.token), "test"))


def test_a_run_that_waits_for_workers_is_explained_by_its_jobs_log() -> None:
    with serving(FakeRay()) as ray:
        ray.add(RUN, {"metadata": META}, "RUNNING", message="Job is currently running.")
        ray.logs[RUN] = f"[a0 n0 #1] run {RUN}\nAuthorization: Bearer {CANARY}\n{WAITS}\n"
        taken = survey(dashboard(ray), RUN)
    found = explain(taken)
    assert [cause.name for cause in found.causes] == ["ray-workers-pending"]
    assert "the cluster has 2 of 8 CPU, 0 of 8 GPU free" in found.causes[0].said
    assert CANARY not in json.dumps(taken.facts())
    assert "does not tell of its nodes" in (taken.unread("RayNode") or "")


def test_a_run_that_failed_is_explained_by_its_last_words() -> None:
    words = {
        "schema": 1,
        "exit_code": 42,
        "error": "data.train = x: no such set. Way out: name one",
        "rank": 1,
        "attempt": 1,
        "step": 0,
    }
    with serving(FakeRay()) as ray:
        ray.add(RUN, {"metadata": META}, "FAILED", message=f"Job entrypoint command failed\n{json.dumps(words)}")
        found = explain(survey(dashboard(ray), RUN))
    assert (found.state, found.causes[0].name, found.causes[0].way_out) == ("failed", "data", "name one")


def test_the_nodes_of_a_cluster_are_in_its_snapshot() -> None:
    node = {"node_id": "f9", "state": "ALIVE", "resources_total": {"CPU": 1.0}, "more": 1}

    class WithNodes(FakeRay):
        def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
            if path.startswith("/api/v0/nodes"):
                return 200, {"result": True, "data": {"result": {"total": 1, "result": [node]}}}
            return super().answer(method, path, body)

    with serving(WithNodes()) as ray:
        found = survey(dashboard(ray)).of("RayNode")
    assert [(one["node_id"], one["resources_total"], "more" in one) for one in found] == [("f9", {"CPU": 1.0}, False)]
