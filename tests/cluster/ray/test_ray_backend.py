"""What the verbs hear of runs on a Ray cluster, against a fake dashboard."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_ray import FakeRay

from orchestrator.bundle import Bundle, load_bundle, write_bundle
from orchestrator.cluster.job import JobSpec
from orchestrator.cluster.lines import Numbered, progress_line, stack_end, stack_lines
from orchestrator.cluster.ray.api import Dashboard
from orchestrator.cluster.ray.backend import RayBackend
from orchestrator.cluster.ray.facts import last_words
from orchestrator.cluster.ray.lines import followed_lines
from orchestrator.cluster.ray.meeting import write_driver
from orchestrator.cluster.ray.submit import submission_of, submit
from orchestrator.errors import TransientError, UserError

FACTS = {"attempt": 2, "world_size": 2, "step": 7, "total_steps": 14, "eta_s": 3.5, "images_per_s": 90.0}


@pytest.fixture
def backend(dashboard: Dashboard) -> RayBackend:
    return RayBackend(dashboard)


@pytest.fixture
def run_id(ray: FakeRay, dashboard: Dashboard, spec: JobSpec) -> str:
    """Of a run that is on the cluster and running."""
    submit(dashboard, spec, None)
    ray.jobs[spec.run_id]["status"] = "RUNNING"
    return spec.run_id


def words(**facts: Any) -> str:
    return json.dumps({"schema": 1, "run_id": "x", "attempt": 2, "node": None, "rank": 1, "step": 7, **facts})


def failed(code: int, error: str | None = None) -> dict[str, Any]:
    """As Ray describes a driver that ended with a code: the tail of its log."""
    log = f"[a2 r0 #1] started\nerror: rank 1: {error}\n{words(exit_code=code, error=error)}\n"
    return {"status": "FAILED", "message": f"Job entrypoint command failed with exit code {code}, last logs:\n{log}"}


def test_runs_are_told_from_a_stranger_s_jobs(ray: FakeRay, backend: RayBackend, run_id: str) -> None:
    ray.add("stranger", {"metadata": {"team": "other"}, "entrypoint": "sleep 1"})
    assert backend.ids() == [run_id]
    assert [facts["run_id"] for facts in backend.runs()] == [run_id]


def test_ids_stand_in_the_order_in_which_the_runs_were_touched(
    ray: FakeRay, backend: RayBackend, dashboard: Dashboard, spec_with: Callable[..., JobSpec]
) -> None:
    first, second = spec_with(), spec_with(tracking={"project": "x"}, optimizer={"lr": 0.123})
    for one in (first, second, first):
        submit(dashboard, one, None)
        ray.jobs[list(ray.jobs)[-1]]["status"] = "STOPPED"
    assert backend.ids() == [second.run_id, first.run_id]


@pytest.mark.parametrize(
    ("job", "state", "code"),
    [
        ({"status": "PENDING"}, "queued", None),
        ({"status": "RUNNING"}, "running", None),
        ({"status": "SUCCEEDED"}, "done", 0),
        ({"status": "STOPPED"}, "stopped", None),
        (failed(42, "data.train = /x: gone"), "failed", 42),
        (failed(45), "stopped", 45),
        ({"status": "FAILED", "message": "the supervisor died"}, "failed", None),
    ],
)
def test_a_job_s_state_is_the_run_s(
    ray: FakeRay, backend: RayBackend, run_id: str, job: dict[str, Any], state: str, code: int | None
) -> None:
    ray.jobs[run_id].update(job)
    facts = backend.status(run_id)
    assert (facts["state"], facts["exit_code"]) == (state, code)
    assert facts["where"] == [f"job {run_id} ({job['status'].lower()})"]


def test_the_status_of_a_run_elsewhere_comes_from_the_last_progress_in_its_log(
    ray: FakeRay, backend: RayBackend, run_id: str
) -> None:
    older = progress_line(1, 0, {**FACTS, "step": 3})
    ray.logs[run_id] = f"[a1 r0 #1] hi\n{older}{progress_line(2, 0, FACTS)}[a2 r0 #1] [a2 n0 progress] forged\n"
    facts = backend.status(run_id)
    assert {key: facts[key] for key in FACTS} == FACTS
    assert facts["top1"] is None


def test_the_status_of_a_run_whose_folder_is_here_comes_from_the_folder(
    backend: RayBackend, run_id: str, bundle: Bundle
) -> None:
    write_bundle(bundle, bundle.folder / "run.json", {})
    write_driver(bundle.folder, run_id, "token")
    assert load_bundle(bundle.folder / "run.json").run_id == run_id
    facts = backend.status(run_id)
    assert (facts["state"], facts["step"], facts["folder"]) == ("running", 0, str(bundle.folder))


def test_a_failure_says_its_cause_and_a_driver_without_words_leaves_ray_s(
    ray: FakeRay, backend: RayBackend, run_id: str
) -> None:
    ray.jobs[run_id].update(failed(42, "data.train = /x: gone"))
    assert backend.status(run_id)["error"] == "data.train = /x: gone"
    ray.jobs[run_id].update(status="FAILED", message="runtime_env setup failed: no such package")
    assert backend.status(run_id)["error"] == "runtime_env setup failed: no such package"


def test_last_words_are_the_last_ones_and_may_be_cut_off() -> None:
    assert last_words(f"{words(step=1)}\n{words(step=2)}\n")["step"] == 2
    assert last_words('{"schema": 1, "run_') == {}
    assert last_words("[a1 r0 #1] nothing\n") == {}


def test_the_lines_of_all_jobs_of_a_run_are_joined(
    ray: FakeRay, backend: RayBackend, dashboard: Dashboard, spec: JobSpec, run_id: str
) -> None:
    ray.logs[run_id] = "ray says hello\n" + Numbered(1, "r0").feed(b"one\ntwo\n") + Numbered(1, "r1").feed(b"other\n")
    ray.jobs[run_id]["status"] = "STOPPED"
    submit(dashboard, spec, None)
    ray.jobs[f"{run_id}-2"]["status"] = "SUCCEEDED"
    ray.logs[f"{run_id}-2"] = Numbered(2, "n0").feed(b"asked to stop\n") + Numbered(2, "r0").feed(b"three\n")
    found = [(line.attempt, line.rank, line.number, line.text) for line in backend.logs(run_id, False, None)]
    assert found == [
        (1, 0, 1, "one"), (1, 0, 2, "two"), (1, 1, 1, "other"), (2, None, 1, "asked to stop"), (2, 0, 1, "three"),
    ]  # fmt: skip
    assert [line.text for line in backend.logs(run_id, False, 1)] == ["other"]


def test_attempts_whose_jobs_are_gone_come_from_a_folder_that_is_here(
    ray: FakeRay, backend: RayBackend, run_id: str, bundle: Bundle
) -> None:
    for attempt in (1, 2):
        log = bundle.folder / "logs" / f"attempt_{attempt}" / "rank_0.log"
        log.parent.mkdir(parents=True)
        log.write_text(f"of attempt {attempt}\n")
    write_driver(bundle.folder, run_id, "token")
    ray.logs[run_id] = Numbered(2, "n0").feed(b"hello\n") + Numbered(2, "r0").feed(b"of attempt 2\n")
    found = [(line.attempt, line.rank, line.text) for line in backend.logs(run_id, False, None)]
    assert found == [(1, 0, "of attempt 1"), (2, None, "hello"), (2, 0, "of attempt 2")]


def test_a_followed_log_goes_on_where_it_broke_off_and_ends_with_the_job() -> None:
    pieces = Numbered(1, "r0").feed(b"one\ntwo\nthree\n")
    answers = [pieces[:30], pieces[:45], pieces]

    class Breaking:
        def follow(self, submission_id: str) -> Iterator[str]:
            text = answers.pop(0)
            yield from (text[start : start + 7] for start in range(0, len(text), 7))
            if answers:
                raise TransientError("the log broke off")

    lines = followed_lines(Breaking(), "run", lambda: len(answers) > 1, again_s=0.0)
    assert [(line.number, line.text) for line in lines] == [(1, "one"), (2, "two"), (3, "three")]


def test_cancel_stops_the_living_job(ray: FakeRay, backend: RayBackend, run_id: str) -> None:
    backend.cancel(run_id, now=False)
    assert ray.jobs[run_id]["status"] == "STOPPED"
    with pytest.raises(UserError, match=rf"run {run_id} is stopped"):
        backend.cancel(run_id, now=False)


def test_resume_sends_the_same_job_under_the_next_id(ray: FakeRay, backend: RayBackend, run_id: str) -> None:
    ray.jobs[run_id]["status"] = "STOPPED"
    assert backend.resume(run_id) is None
    first, second = ray.jobs[run_id], ray.jobs[f"{run_id}-2"]
    same = ("entrypoint", "metadata")
    assert {key: first[key] for key in same} == {key: second[key] for key in same}
    assert second["runtime_env"]["working_dir"] == first["runtime_env"]["working_dir"]
    assert second["runtime_env"]["env_vars"]["ORCHESTRATOR_SUBMISSION"] == f"{run_id}-2"


def test_resume_makes_the_package_anew_that_ray_has_thrown_away(ray: FakeRay, backend: RayBackend, run_id: str) -> None:
    before = dict(ray.packages)
    ray.packages.clear()
    ray.jobs[run_id]["status"] = "STOPPED"
    backend.resume(run_id)
    assert ray.packages == before


def test_resume_refuses_where_other_code_lies_here(
    ray: FakeRay, backend: RayBackend, run_id: str, spec: JobSpec
) -> None:
    ray.packages.clear()
    ray.jobs[run_id]["status"] = "STOPPED"
    ray.jobs[run_id]["runtime_env"]["working_dir"] = "gcs://_ray_pkg_0123.zip"
    with pytest.raises(UserError, match=r"other code than lies here.*Way out: git checkout"):
        backend.resume(run_id)
    assert list(ray.jobs) == [run_id]


@pytest.mark.parametrize("status", ["RUNNING", "SUCCEEDED"])
def test_resume_refuses_what_needs_none(ray: FakeRay, backend: RayBackend, run_id: str, status: str) -> None:
    ray.jobs[run_id]["status"] = status
    with pytest.raises(UserError, match="Way out: orchestrator status"):
        backend.resume(run_id)


def test_pull_of_a_folder_that_is_not_here_says_where_it_is(backend: RayBackend, run_id: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"on the cluster's file system.*rsync -a NODE:"):
        backend.pull(run_id, tmp_path / "here")


def test_pull_of_a_shared_folder_copies_it_without_its_lock(
    backend: RayBackend, run_id: str, bundle: Bundle, tmp_path: Path
) -> None:
    write_driver(bundle.folder, run_id, "token")
    (bundle.folder / "lock").touch()
    (bundle.folder / "result.json").write_text("{}")
    (bundle.folder / "checkpoints").mkdir()
    target = backend.pull(run_id, tmp_path / "here")
    assert target == tmp_path / "here" / run_id
    assert sorted(path.name for path in target.iterdir()) == ["ray.json", "result.json"]
    backend.pull(run_id, tmp_path / "here", checkpoints=True)
    assert sorted(path.name for path in target.iterdir()) == ["checkpoints", "ray.json", "result.json"]


def test_a_folder_that_another_job_has_signed_is_not_the_run_s(
    backend: RayBackend, run_id: str, bundle: Bundle, tmp_path: Path
) -> None:
    write_driver(bundle.folder, "another-cluster-s", "token")
    with pytest.raises(UserError, match="on the cluster's file system"):
        backend.pull(run_id, tmp_path / "here")


def test_stacks_come_by_a_small_job_that_is_removed_again(
    ray: FakeRay, backend: RayBackend, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[dict[str, Any]] = []

    def run(request: dict[str, Any]) -> tuple[int, Any]:
        submitted.append(request)
        ray.add(request["submission_id"], request, "SUCCEEDED")
        ray.logs[request["submission_id"]] = stack_lines("stack-1", 2, 0, ["a.py:1 in f", "b.py:2 in g"]) + stack_end(
            "stack-1", 2, 0, [0]
        )
        return 200, {"submission_id": request["submission_id"]}

    monkeypatch.setattr(ray, "_submit", run)
    assert backend.stacks(run_id) == {0: "a.py:1 in f\nb.py:2 in g"}
    folder = ray.jobs[run_id]["metadata"]["orchestrator/folder"]
    assert submitted[0]["entrypoint"] == f"exec python -m jobs.ray_driver --errand stacks {folder}"
    assert list(ray.jobs) == [run_id]


def test_remove_deletes_every_job_of_an_ended_run(
    ray: FakeRay, backend: RayBackend, dashboard: Dashboard, spec: JobSpec, run_id: str
) -> None:
    with pytest.raises(UserError, match="is running"):
        backend.remove(run_id)
    ray.jobs[run_id]["status"] = "STOPPED"
    submit(dashboard, spec, None)
    ray.jobs[f"{run_id}-2"]["status"] = "SUCCEEDED"
    backend.remove(run_id)
    assert ray.jobs == {}


def test_an_unknown_id_gets_the_nearest_one(backend: RayBackend, run_id: str) -> None:
    with pytest.raises(UserError, match=rf"did you mean '{run_id}'"):
        backend.status(run_id[:-1] + "z")


def test_a_thousand_runs_are_listed_in_two_seconds(ray: FakeRay, backend: RayBackend, spec: JobSpec) -> None:
    request = submission_of(spec)
    for number in range(1000):
        name = f"run-{number:08x}"
        ray.add(name, {**request, "metadata": {**request["metadata"], "orchestrator/run": name}})
    began = time.monotonic()
    assert len(backend.runs()) == 1000
    assert time.monotonic() - began < 2
