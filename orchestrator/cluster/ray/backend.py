"""Runs on a Ray cluster: its jobs are the state, their logs and the run's folder the rest."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cluster.backend import LogLine
from orchestrator.cluster.code import archive_of
from orchestrator.cluster.lines import read_lines
from orchestrator.cluster.ray.api import Dashboard, connect
from orchestrator.cluster.ray.errand import Errand
from orchestrator.cluster.ray.facts import facts_of, state_of
from orchestrator.cluster.ray.lines import ended_lines, followed_lines, with_older
from orchestrator.cluster.ray.meeting import SUBMISSION_VARIABLE, driver_file
from orchestrator.cluster.ray.submit import (
    FOLDER_KEY,
    LIVING,
    RUN_KEY,
    build_package,
    bundle_of,
    jobs_of,
    next_id,
    package_name,
    run_json,
    send,
)
from orchestrator.cluster_config import ClusterConfig
from orchestrator.errors import TransientError, UserError, nearest
from orchestrator.files import read_json

if TYPE_CHECKING:
    from orchestrator.cluster.snapshot import Snapshot

ERRAND_S = 60.0
POLL_S = 0.3
Job = dict[str, Any]


def open_backend(config: ClusterConfig, runs_dir: Path) -> RayBackend:
    """The backend of the cluster that the config names; where the runs' folders are, its jobs say."""
    return RayBackend(connect(config))


class RayBackend:
    """Implements `cluster.backend.Backend`."""

    def __init__(self, dashboard: Dashboard):
        self._dashboard = dashboard

    def ids(self) -> list[str]:
        return list(dict.fromkeys(job["metadata"][RUN_KEY] for job in reversed(jobs_of(self._dashboard))))[::-1]

    def runs(self) -> list[dict[str, Any]]:
        jobs: dict[str, list[Job]] = {}
        for job in jobs_of(self._dashboard):
            jobs.setdefault(job["metadata"][RUN_KEY], []).append(job)
        return [facts_of(jobs[run_id], shared_folder(jobs[run_id])) for run_id in self.ids()]

    def status(self, run_id: str) -> dict[str, Any]:
        jobs = self._jobs(run_id)
        folder = shared_folder(jobs)
        log = "" if folder else self._dashboard.logs(jobs[-1]["submission_id"])
        where = [f"job {job['submission_id']} ({job['status'].lower()})" for job in jobs]
        return {**facts_of(jobs, folder, log), "where": where}

    def logs(self, run_id: str, follow: bool, rank: int | None) -> Iterator[LogLine]:
        jobs = self._jobs(run_id)
        newest = jobs[-1]["submission_id"]

        def is_living() -> bool:
            return self._dashboard.job(newest)["status"] in LIVING

        ended = jobs[:-1] if follow else jobs
        told = ended_lines(self._dashboard.logs(job["submission_id"]) for job in ended)
        now = followed_lines(self._dashboard, newest, is_living) if follow else iter(())
        lines = with_older(shared_folder(jobs), chain(told, now))
        return (line for line in lines if rank is None or line.rank == rank)

    def cancel(self, run_id: str, now: bool) -> None:
        job = self._living(run_id)
        if now:
            self._errand(job, Errand.now)
        else:
            self._dashboard.stop(job["submission_id"])

    def resume(self, run_id: str) -> int | None:
        jobs = self._jobs(run_id)
        last, state = jobs[-1], state_of(jobs[-1])
        if last["status"] in LIVING or state == "done":
            raise UserError(f"run {run_id} is {state}. Way out: orchestrator status {run_id}")
        name = str(last["runtime_env"]["working_dir"]).rpartition("/")[2]
        if not self._dashboard.has_package(name):
            self._dashboard.upload(name, _package_again(last, name))
        submission_id = next_id(run_id, [job["submission_id"] for job in jobs])
        send(self._dashboard, run_id, _again(last, submission_id, last["entrypoint"]))
        return None

    def pull(self, run_id: str, to: Path, checkpoints: bool = False) -> Path:
        jobs = self._jobs(run_id)
        there, target = jobs[-1]["metadata"][FOLDER_KEY], to / run_id
        folder = shared_folder(jobs)
        if folder is None:
            raise UserError(
                f"run {run_id}: its folder {there} is on the cluster's file system, which this machine does not have. "
                f"Way out: mount it here, or copy it: rsync -a NODE:{there} {to}/"
            )
        if folder.resolve() != target.resolve():
            left = ("lock", ".*.tmp") if checkpoints else ("lock", ".*.tmp", "checkpoints")
            shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left))
        return target

    def stacks(self, run_id: str) -> dict[int, str]:
        text = self._errand(self._living(run_id), Errand.stacks)
        stacks: dict[int, list[str]] = {}
        for said in read_lines(text.split("\n")):
            if said.kind == "stack" and said.rank is not None:
                stacks.setdefault(said.rank, []).append(said.text)
        return {rank: "\n".join(frames) for rank, frames in stacks.items()}

    def snapshot(self, run_id: str | None) -> Snapshot:
        from orchestrator.cluster.ray.survey import survey

        return survey(self._dashboard, run_id and str(self._jobs(run_id)[-1]["metadata"][RUN_KEY]))

    def remove(self, run_id: str) -> None:
        jobs = self._jobs(run_id)
        if jobs[-1]["status"] in LIVING:
            raise UserError(f"run {run_id} is running. Way out: orchestrator cancel {run_id}")
        for job in jobs:
            self._dashboard.delete(job["submission_id"])

    def _jobs(self, run_id: str) -> list[Job]:
        """Of a run, the newest last."""
        jobs = jobs_of(self._dashboard, run_id)
        if not jobs:
            known = self.ids()
            hint = nearest(run_id, known) if known else "there is none at all"
            raise UserError(f"ID {run_id} is no run on {self._dashboard.address}: {hint} Way out: orchestrator ls")
        return jobs

    def _living(self, run_id: str) -> Job:
        last = self._jobs(run_id)[-1]
        if last["status"] not in LIVING:
            raise UserError(f"run {run_id} is {state_of(last)}. Way out: orchestrator status {run_id}")
        return last

    def _errand(self, job: Job, what: Errand) -> str:
        """Let a small job with the code of the run do something beside it; returns what it printed."""
        folder, name = job["metadata"][FOLDER_KEY], f"{job['submission_id']}-{what.value}-{time.time_ns()}"
        python = shlex.split(job["entrypoint"])[1]
        command = ["exec", python, "-m", "jobs.ray_driver", "--errand", what.value, folder]
        request = {**_again(job, name, shlex.join(command)), "metadata": {}}
        self._dashboard.submit(request)
        until = time.monotonic() + ERRAND_S
        while (status := self._dashboard.job(name)["status"]) in LIVING:
            if time.monotonic() > until:
                raise TransientError(f"job {name} did not end within {ERRAND_S:g} s. Way out: try again")
            time.sleep(POLL_S)
        text = self._dashboard.logs(name)
        self._dashboard.delete(name)
        if status != "SUCCEEDED":
            raise TransientError(f"job {name} ended as {status}: {text[-500:]}. Way out: try again")
        return text


def shared_folder(jobs: list[Job]) -> Path | None:
    """The run's folder where this machine has the same one: its driver has signed it."""
    folder = Path(jobs[-1]["metadata"][FOLDER_KEY])
    try:
        signed = read_json(driver_file(folder)).get("submission_id")
    except (OSError, ValueError):
        return None
    return folder if signed in [job["submission_id"] for job in jobs] else None


def _again(job: Job, submission_id: str, entrypoint: str) -> dict[str, Any]:
    """The request of an earlier job under another id."""
    env = job["runtime_env"]
    return {
        "submission_id": submission_id,
        "entrypoint": entrypoint,
        "runtime_env": {
            "working_dir": env["working_dir"],
            "env_vars": {**env.get("env_vars", {}), SUBMISSION_VARIABLE: submission_id},
        },
        "metadata": {key: value for key, value in job["metadata"].items() if key != "job_submission_id"},
    }


def _package_again(job: Job, name: str) -> bytes:
    """The package of an ended job, which Ray has thrown away, from the code that is here. Raises UserError if other."""
    bundle = bundle_of(job)
    cluster, run = bundle["config"]["cluster"], run_json(bundle)
    archive = archive_of(cluster["code_files"]) if cluster["code"] == "archive" else None
    if package_name(run, archive and archive.digest) != name:
        commit = (bundle.get("git") or {}).get("commit") or "that commit"
        raise UserError(
            f"run {bundle['run_id']} was submitted with other code than lies here, and Ray no longer keeps it. "
            f"Way out: git checkout {commit}, or the command that started it, which goes on with the code that is here"
        )
    return build_package(run, archive and archive.content)
