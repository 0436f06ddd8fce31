"""The folder of a run comes here from its store, or through the log of a short-lived Job that mounts its claim.

That needs no right besides those of submitting, where a copy by exec or a port forward would need one that also opens
every other pod. What is here already is not sent again, so that a second pull brings only what has grown.
"""

from __future__ import annotations

import base64
import json
import logging
import posixpath
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.cluster.backend import LogLine
from orchestrator.cluster.kubernetes import reader
from orchestrator.cluster.kubernetes.api import Api, Object
from orchestrator.cluster.kubernetes.failures import Conflict
from orchestrator.cluster.kubernetes.logs import PodLog
from orchestrator.cluster.kubernetes.pod import verbatim
from orchestrator.cluster.kubernetes.pods import has_started, obstacle_of
from orchestrator.cluster.kubernetes.resources import JOB, POD, PRODUCT, TRAINING_RUNTIME, run_of
from orchestrator.cluster.kubernetes.runs import Found, bundle_of
from orchestrator.cluster.rank_logs import read_logs
from orchestrator.cluster.stored_runs import StoredRuns
from orchestrator.errors import OrchestratorError, TransientError, UserError
from orchestrator.files import hash_file

logger = logging.getLogger(__name__)

BYTES_PER_S = 8 << 20
START_S = 180.0
"""In which the reader must have begun."""
POLL_S = 0.5
ROUNDS = 3
READER = "orchestrator/reader"
"""Label of the reader's objects: they are no run."""
LONGEST_S = 6 * 3600


def pull_folder(api: Api, found: Found, to: Path, checkpoints: bool) -> Path:
    """Copy the run's folder to `to`/ID. Raises UserError where no claim holds it."""
    target = to / run_of(found.run)
    _receive(api, found, target, {"below": [""], "without": [] if checkpoints else ["checkpoints/"]})
    return target


def earlier_lines(api: Api, found: Found, before: int | None, rank: int | None) -> Iterator[LogLine]:
    """From the run's folder, what ranks said in attempts before this one, or in all; nothing if it is out of reach."""
    below = ["logs/"] if before is None else [f"logs/attempt_{number}/" for number in range(1, before)]
    with TemporaryDirectory() as scratch:
        try:
            _receive(api, found, Path(scratch), {"below": below, "without": []})
        except (UserError, TransientError) as error:
            logger.warning("the logs of earlier attempts are not shown: %s", error)
        yield from read_logs(Path(scratch), rank, lambda: False)


def stored_facts(api: Api, found: Found) -> dict[str, Any]:
    """Where the run stands by its record in an object store; nothing where it has none, or it is out of reach."""
    try:
        runs_dir = runs_dir_of(api, found)
        return StoredRuns(runs_dir).facts(run_of(found.run)) if "://" in runs_dir else {}
    except (UserError, TransientError) as error:
        logger.warning("the record of %s is not read: %s", found.name, error)
        return {}


def _receive(api: Api, found: Found, target: Path, asked: dict[str, Any]) -> None:
    runs_dir, run_id = runs_dir_of(api, found), run_of(found.run)
    if "://" in runs_dir:
        below, without = tuple(asked["below"]), tuple(asked["without"])
        stored = StoredRuns(runs_dir)
        stored.fetch(run_id, target, lambda name: name.startswith(below) and not name.startswith(without))
        return
    folder = posixpath.join(runs_dir, run_id)
    for _ in range(ROUNDS):
        with _reader(api, found, folder, {"known": known_files(target), **asked}) as lines:
            if Receiver(target).take(lines):
                return
        logger.info("%s: lines of the reader's log were lost; asking again for what lacks", found.name)
    raise TransientError(f"{found.name}: its folder did not come whole in {ROUNDS} tries. Way out: try again")


def runs_dir_of(api: Api, found: Found) -> str:
    """The folder of runs as the pods see it, or its address in a store."""
    run_id = run_of(found.run)
    bundle = bundle_of(api, run_id)
    if bundle is None:
        raise UserError(f"ID {run_id}: its ConfigMap run-{run_id} is gone. Way out: submit it again, then pull")
    return str(bundle["config"]["runs_dir"])


def known_files(target: Path) -> dict[str, list[Any]]:
    """[size, sha256] of each file that is here."""
    paths = [path for path in sorted(target.rglob("*")) if path.is_file()]
    return {str(path.relative_to(target)): [path.stat().st_size, hash_file(path)] for path in paths}


class Receiver:
    """Puts files together from the lines of `reader`; one that did not come whole stays as far as it is right."""

    def __init__(self, target: Path):
        self._target = target
        self._path: Path | None = None
        self._size, self._next = 0, 0
        self._whole = True

    def take(self, lines: Iterable[str]) -> bool:
        """Whether everything came."""
        self._target.mkdir(parents=True, exist_ok=True)
        for line in lines:
            kind, _, text = line.partition(" ")
            match kind:
                case "file":
                    self._begin(json.loads(text))
                case "part":
                    number, _, content = text.partition(" ")
                    self._add(int(number), content)
                case "end":
                    self._end(json.loads(text))
                case "done":
                    return self._whole
                case "none":
                    raise UserError(f"{text}: the claim has no such folder yet. Way out: wait until the run has begun")
                case _:
                    logger.info("reader: %s", line)
        return False

    def _begin(self, about: dict[str, Any]) -> None:
        path = PurePosixPath(about["path"])
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{path}: lies outside of the run's folder. Way out: look at who writes to the claim")
        self._path = self._target / path
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        with open(self._path, "r+b") as file:
            file.truncate(about["from"])

    def _add(self, number: int, content: str) -> None:
        lost = number != self._next
        self._next = number + 1
        if lost:  # the rest of this file cannot be placed
            self._whole, self._path = False, None
        if self._path is not None:
            with open(self._path, "ab") as file:
                file.write(base64.b64decode(content))

    def _end(self, about: dict[str, Any]) -> None:
        path = self._target / about["path"]
        if not path.is_file() or hash_file(path) != about["sha256"]:
            self._whole = False
            logger.info("%s did not come whole", about["path"])


@contextmanager
def _reader(api: Api, found: Found, folder: str, asked: dict[str, Any]) -> Iterator[Iterator[str]]:
    """Lines of a reader's log; its objects are removed at the end, and by the cluster if this cannot."""
    name = f"pull-{found.name}-{uuid.uuid4().hex[:4]}"
    job = reader_job(name, template_of(api, found), folder, {**asked, "bytes_per_s": BYTES_PER_S})
    try:
        with suppress(Conflict):  # a repeated call met what the call itself had created: the name is no other's
            api.create(job)
        yield (text for _, text in PodLog(api, _started(api, name)).follow())
    finally:
        _remove(api, name)


def _remove(api: Api, name: str) -> None:
    """What came is here whether or not the reader's Job can be removed; the cluster does it a minute after its end."""
    try:
        api.delete(JOB, name)
    except OrchestratorError as error:
        logger.warning("job %s stays for a while: %s", name, error)


def _started(api: Api, name: str) -> Object:
    until = time.monotonic() + START_S
    while True:
        pods = api.list(POD, f"{READER}={name}")[0]
        started = next(filter(has_started, pods), None)
        if started is not None:
            return started
        if time.monotonic() > until:
            why = obstacle_of(pods, []) or "its pod was not made"
            raise TransientError(f"{name} did not start in {START_S:.0f} s: {why}. Way out: mend that, or try again")
        time.sleep(POLL_S)


def template_of(api: Api, found: Found) -> Object:
    """The template of the pods that train."""
    spec: dict[str, Any] = found.run["spec"]
    match found.run["kind"]:
        case "Job":
            return spec["template"]
        case "RayJob":
            return spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
        case "TrainJob":
            spec = api.get(TRAINING_RUNTIME, found.name)["spec"]["template"]["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"]["template"]


def reader_job(name: str, template: Object, folder: str, asked: dict[str, Any]) -> Object:
    """A Job like the run's pods, with nothing of them but the image, its rights and the claim. Pure."""
    spec = template["spec"]
    trains = spec["containers"][0]
    volume, mount = _claim_below(spec, trains, folder)
    container = {
        "name": "reader",
        "image": trains["image"],
        "command": [_python_of(trains), "-I", "-c", *map(verbatim, (_program(), folder, json.dumps(asked)))],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        "securityContext": trains.get("securityContext"),
        "volumeMounts": [{**mount, "readOnly": True}],
    }
    kept = ("imagePullSecrets", "nodeSelector", "tolerations", "securityContext", "serviceAccountName")
    pod = {
        **{key: spec[key] for key in kept if spec.get(key)},
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [{key: value for key, value in container.items() if value is not None}],
        "volumes": [volume],
    }
    product, value = PRODUCT.split("=")
    labels = {product: value, READER: name}
    return {
        "apiVersion": JOB.api,
        "kind": JOB.kind,
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": LONGEST_S,
            "ttlSecondsAfterFinished": 60,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def _python_of(trains: Object) -> str:
    """The interpreter that the image has. In pods of Ray, whose command KubeRay writes, the hook names it."""
    command = trains.get("command") or trains["lifecycle"]["preStop"]["exec"]["command"]
    return command[0]


def _claim_below(spec: Object, trains: Object, folder: str) -> tuple[Object, Object]:
    """The volume and the mount that hold a folder."""
    claims = {one["name"]: one for one in spec.get("volumes", ()) if "persistentVolumeClaim" in one}
    below = [one for one in trains.get("volumeMounts", ()) if one["name"] in claims
             and PurePosixPath(folder).is_relative_to(one["mountPath"])]  # fmt: skip
    if not below:
        raise UserError(f"{folder}: no claim of the run holds it. Way out: cluster.volumes and runs_dir at submission")
    mount = max(below, key=lambda one: len(one["mountPath"]))
    return claims[mount["name"]], mount


def _program() -> str:
    return Path(reader.__file__).read_text()
