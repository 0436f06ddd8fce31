"""A run as a job of Ray's Jobs API: rendering is pure, sending the same run again finds it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import shlex
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.cluster.job import END_S, JobSpec
from orchestrator.cluster.ray.api import Dashboard, RequestRefused
from orchestrator.cluster.ray.meeting import SUBMISSION_VARIABLE
from orchestrator.errors import TransientError, UserError

RUN_KEY, FOLDER_KEY, BUNDLE_KEY = "orchestrator/run", "orchestrator/folder", "orchestrator/bundle"
"""Of a job's metadata: what tells our jobs from others, where the run's folder is, and run.json for a resume."""
RUN_FILE = "run.json"
"""In the working directory, which Ray unpacks on every node that the job touches."""
LIVING = ("PENDING", "RUNNING")
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every file in the package, so that the same content has the same bytes."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """What a submission came to."""

    submission_id: str
    is_new: bool
    """False: the run was there already, and nothing was sent."""


def submission_of(spec: JobSpec, earlier: Sequence[str] = ()) -> dict[str, Any]:
    """The request that is sent, as `--dry-run` prints it. `earlier`: the submissions that this run has had."""
    submission_id = next_id(spec.run_id, earlier)
    return {
        "submission_id": submission_id,
        "entrypoint": f"exec {shlex.join([*spec.command[:-1], RUN_FILE])}",  # no shell stays to take the signals
        "runtime_env": {
            "working_dir": f"gcs://{package_name(run_json(spec.bundle), spec.archive_digest)}",
            "env_vars": {**_environment(spec), SUBMISSION_VARIABLE: submission_id},
        },
        "metadata": {
            "app.kubernetes.io/name": "orchestrator",
            RUN_KEY: spec.run_id,
            FOLDER_KEY: f"{spec.bundle['config']['runs_dir'].rstrip('/')}/{spec.run_id}",
            BUNDLE_KEY: base64.b64encode(zlib.compress(run_json(spec.bundle), 9)).decode(),
        },
    }


def _environment(spec: JobSpec) -> dict[str, str]:
    """Of the job's processes; anybody who sees the job may read it."""
    return {
        **spec.env,
        "RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(spec.grace_s + END_S)),
    }


def next_id(run_id: str, earlier: Sequence[str]) -> str:
    """`run_id`, then `run_id-2` and so on: Ray takes a submission's id only once."""
    numbers = {number for one in earlier if (number := _number(run_id, one))}
    return run_id if not numbers else f"{run_id}-{max(numbers) + 1}"


def _number(run_id: str, submission_id: str) -> int | None:
    if submission_id == run_id:
        return 1
    tail = submission_id.removeprefix(f"{run_id}-")
    return int(tail) if tail != submission_id and tail.isdecimal() else None


def run_json(bundle: Mapping[str, Any]) -> bytes:
    return (json.dumps(bundle, indent=2, ensure_ascii=False) + "\n").encode()


def bundle_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """run.json of a job that was submitted before."""
    return json.loads(zlib.decompress(base64.b64decode(job["metadata"][BUNDLE_KEY])))


def package_name(run: bytes, archive_digest: str | None) -> str:
    """Of the zip with run.json and the code, by its content."""
    digest = hashlib.sha256(run + (archive_digest or "").encode())
    return f"_ray_pkg_{digest.hexdigest()[:32]}.zip"


def build_package(run: bytes, archive: bytes | None) -> bytes:
    """The zip itself. `archive`: the code as .tar.gz; None where the nodes have it installed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in sorted([(RUN_FILE, run), *_files_of(archive)]):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            package.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _files_of(archive: bytes | None) -> Iterable[tuple[str, bytes]]:
    if archive is None:
        return
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield member.name.removeprefix("./"), file.read()


def jobs_of(dashboard: Dashboard, run_id: str | None = None) -> list[dict[str, Any]]:
    """Our jobs on this cluster, or those of one run, the oldest first."""
    ours = [job for job in dashboard.jobs() if RUN_KEY in (job.get("metadata") or {})]
    return [job for job in ours if run_id in (None, job["metadata"][RUN_KEY])]


def submit(dashboard: Dashboard, spec: JobSpec, archive: bytes | None) -> Submitted:
    """Send a run unless it is there already. Two submitters at once make one job: Ray takes an id only once."""
    earlier = jobs_of(dashboard, spec.run_id)
    if earlier and earlier[-1]["status"] in LIVING:
        return Submitted(earlier[-1]["submission_id"], is_new=False)
    request = submission_of(spec, [job["submission_id"] for job in earlier])
    run = run_json(spec.bundle)
    name = package_name(run, spec.archive_digest)
    if not dashboard.has_package(name):
        dashboard.upload(name, build_package(run, archive))
    return send(dashboard, spec.run_id, request)


def send(dashboard: Dashboard, run_id: str, request: Mapping[str, Any]) -> Submitted:
    """Post a job whose package is there. Raises UserError for what the cluster refuses."""
    try:
        return Submitted(dashboard.submit(request), is_new=True)
    except (RequestRefused, TransientError) as error:
        # either somebody else was quicker, or the answer was lost on its way: both have left a job
        for job in jobs_of(dashboard, run_id):
            if job["submission_id"] == request["submission_id"]:
                return Submitted(job["submission_id"], is_new=False)
        if isinstance(error, TransientError):
            raise
        raise UserError(
            f"cluster.address = {dashboard.address}: the cluster refused the job ({error.text[-500:]}). "
            "Way out: what it says; nothing runs"
        ) from None
