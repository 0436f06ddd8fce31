"""The request that is sent: pure, content-addressed, without secrets, and sent once."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable

import pytest
from fake_ray import FakeRay

from orchestrator.cluster.code import pack
from orchestrator.cluster.job import JobSpec
from orchestrator.cluster.ray.api import Dashboard
from orchestrator.cluster.ray.submit import (
    BUNDLE_KEY,
    Submitted,
    build_package,
    bundle_of,
    next_id,
    package_name,
    run_json,
    submission_of,
    submit,
)
from orchestrator.errors import UserError
from orchestrator.options import CodeSource


def test_the_request_is_a_pure_function_of_the_job(spec: JobSpec) -> None:
    request = submission_of(spec)
    assert request == submission_of(spec)
    assert request["metadata"].pop(BUNDLE_KEY)
    assert request == {
        "submission_id": spec.run_id,
        "entrypoint": "exec python -m jobs.ray_driver run.json",
        "runtime_env": {
            "working_dir": f"gcs://{package_name(run_json(spec.bundle), None)}",
            "env_vars": {
                "OMP_NUM_THREADS": "1",
                "RAY_JOB_STOP_WAIT_TIME_S": "45",
                "ORCHESTRATOR_SUBMISSION": spec.run_id,
            },
        },
        "metadata": {
            "app.kubernetes.io/name": "orchestrator",
            "orchestrator/run": spec.run_id,
            "orchestrator/folder": f"{spec.bundle['config']['runs_dir']}/{spec.run_id}",
        },
    }


def test_ray_kills_a_stopped_job_only_after_the_grace_period(spec_with: Callable[..., JobSpec]) -> None:
    request = submission_of(spec_with(cluster={"grace_s": 299.5}))
    assert request["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "315"


def test_an_interpreter_with_hostile_characters_stays_one_word(spec_with: Callable[..., JobSpec]) -> None:
    request = submission_of(spec_with(cluster={"python": "/opt/my env/bin/python; id"}))
    assert request["entrypoint"] == "exec '/opt/my env/bin/python; id' -m jobs.ray_driver run.json"


def test_values_of_secrets_are_nowhere_only_the_places_where_nodes_find_them(
    spec_with: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "canary-value")
    spec = spec_with(tracking={"secret": "/etc/wandb/key"}, cluster={"store_secret": "/etc/store/keys"})
    request = submission_of(spec)
    sent = (
        json.dumps(request)
        + json.dumps(bundle_of(request))
        + build_package(run_json(spec.bundle), None).decode("latin1")
    )
    assert "canary-value" not in sent
    assert bundle_of(request)["config"]["tracking"]["secret"] == "/etc/wandb/key"


def test_a_later_submission_of_a_run_counts_on() -> None:
    assert next_id("digits-0123abcd", []) == "digits-0123abcd"
    assert next_id("digits-0123abcd", ["digits-0123abcd"]) == "digits-0123abcd-2"
    earlier = ["digits-0123abcd", "digits-0123abcd-10", "digits-0123abcd-2", "digits-0123abcd-now", "other-9"]
    assert next_id("digits-0123abcd", earlier) == "digits-0123abcd-11"


def test_the_package_holds_the_run_and_the_code_and_has_the_same_bytes_every_time(spec: JobSpec) -> None:
    archive = pack([("orchestrator/__init__.py", b"code"), ("jobs/train.py", b"more")])
    package = build_package(run_json(spec.bundle), archive)
    assert package == build_package(run_json(spec.bundle), archive)
    with zipfile.ZipFile(io.BytesIO(package)) as opened:
        assert opened.namelist() == ["jobs/train.py", "orchestrator/__init__.py", "run.json"]
        assert opened.read("jobs/train.py") == b"more"
        assert json.loads(opened.read("run.json")) == json.loads(run_json(spec.bundle))


def test_other_code_or_another_config_is_another_package(spec: JobSpec) -> None:
    run = run_json(spec.bundle)
    names = {package_name(run, None), package_name(run, "a"), package_name(run, "b"), package_name(run + b" ", "b")}
    assert len(names) == 4


def test_a_run_is_uploaded_and_submitted(ray: FakeRay, dashboard: Dashboard, spec: JobSpec) -> None:
    assert submit(dashboard, spec, None) == Submitted(spec.run_id, is_new=True)
    job = ray.jobs[spec.run_id]
    name = job["runtime_env"]["working_dir"].removeprefix("gcs://")
    assert ray.packages == {name: build_package(run_json(spec.bundle), None)}
    assert bundle_of(job) == json.loads(run_json(spec.bundle))


def test_what_is_there_is_not_uploaded_again(ray: FakeRay, dashboard: Dashboard, spec: JobSpec) -> None:
    submit(dashboard, spec, None)
    ray.jobs[spec.run_id]["status"] = "STOPPED"
    submit(dashboard, spec, None)
    assert [method for method, path, _ in ray.requests if "/packages/" in path] == ["GET", "PUT", "GET"]


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_run_that_is_there_is_found_and_nothing_is_sent(
    ray: FakeRay, dashboard: Dashboard, spec: JobSpec, status: str
) -> None:
    submit(dashboard, spec, None)
    ray.jobs[spec.run_id]["status"] = status
    before = len(ray.requests)
    assert submit(dashboard, spec, None) == Submitted(spec.run_id, is_new=False)
    assert [method for method, *_ in ray.requests[before:]] == ["GET"]


@pytest.mark.parametrize("status", ["STOPPED", "FAILED", "SUCCEEDED"])
def test_a_run_that_has_ended_goes_on_as_another_job(
    ray: FakeRay, dashboard: Dashboard, spec: JobSpec, status: str
) -> None:
    submit(dashboard, spec, None)
    ray.jobs[spec.run_id]["status"] = status
    assert submit(dashboard, spec, None) == Submitted(f"{spec.run_id}-2", is_new=True)


def test_of_two_submitters_at_once_one_sends_and_the_other_finds_it(
    ray: FakeRay, dashboard: Dashboard, spec: JobSpec
) -> None:
    ray.raced = True
    assert submit(dashboard, spec, None) == Submitted(spec.run_id, is_new=False)
    assert list(ray.jobs) == [spec.run_id]


def test_a_refusal_is_told_with_the_clusters_words(ray: FakeRay, dashboard: Dashboard, spec: JobSpec) -> None:
    ray.refuse = "ValueError: no such runtime_env plugin"
    with pytest.raises(UserError, match=r"refused the job .*no such runtime_env plugin.*nothing runs"):
        submit(dashboard, spec, None)
    assert ray.jobs == {}


def test_a_stranger_s_job_is_none_of_ours(ray: FakeRay, dashboard: Dashboard, spec: JobSpec) -> None:
    ray.add(spec.run_id, {"metadata": None, "entrypoint": "sleep 1"}, "SUCCEEDED")
    with pytest.raises(UserError, match="already exists"):
        submit(dashboard, spec, None)


def test_an_archive_is_part_of_the_address(spec_with: Callable[..., JobSpec]) -> None:
    spec = spec_with("d" * 64, cluster={"code": CodeSource.archive})
    name = package_name(run_json(spec.bundle), "d" * 64)
    assert submission_of(spec)["runtime_env"]["working_dir"] == f"gcs://{name}"
