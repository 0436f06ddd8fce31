"""What lies where in a pod: volumes, and the mounts that show them."""

from __future__ import annotations

import posixpath
from math import ceil
from typing import Any, NamedTuple

from orchestrator.cluster.job import CODE_FOLDER, RUN_FOLDER, JobSpec, SecretFile
from orchestrator.cluster.kubernetes.resources import ASK

HOME = "/home/user"
ARCHIVE_FOLDER = "/etc/orchestrator/archive"
ARCHIVE = "code.tar.gz"
ASK_FOLDER = "/etc/orchestrator/ask"
SECRET_MODE = 0o440
"""Readable through the pod's group, for its user is not the owner."""
MIB = 1 << 20


class Mounted(NamedTuple):
    """A volume of a pod and where its container sees it."""

    volume: dict[str, Any]
    mounts: list[dict[str, Any]]


def mounted(spec: JobSpec, shm_bytes: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes and mounts of a pod."""
    every = [
        _run(spec),
        _ask(),
        _scratch("shm", "/dev/shm", {"medium": "Memory", "sizeLimit": bytes_of(shm_bytes)}),
        _scratch("tmp", "/tmp", _capped(spec)),
        _scratch("home", HOME, _capped(spec)),
        *(_code(spec) if spec.archive_digest else ()),
        *(_secret(one) for one in spec.secrets),
        *_claims(spec),
    ]
    return [one.volume for one in every], [mount for one in every for mount in one.mounts]


def bytes_of(count: int) -> str:
    """A quantity, rounded up to whole MiB."""
    return f"{ceil(count / MIB)}Mi"


def run_name(spec: JobSpec) -> str:
    return f"run-{spec.run_id}"


def code_name(archive_digest: str) -> str:
    return f"code-{archive_digest[:12]}"


def _run(spec: JobSpec) -> Mounted:
    return _mount({"name": "run", "configMap": {"name": run_name(spec)}}, RUN_FOLDER)


def _ask() -> Mounted:
    """An annotation as a file: how a request reaches a pod without exec and without a token in it."""
    field = {"fieldPath": f"metadata.annotations['{ASK}']"}
    source = {"items": [{"path": "ask", "fieldRef": field}]}
    return _mount({"name": "ask", "downwardAPI": source}, ASK_FOLDER)


def _scratch(name: str, path: str, source: dict[str, Any]) -> Mounted:
    return Mounted({"name": name, "emptyDir": source}, [{"name": name, "mountPath": path}])


def _capped(spec: JobSpec) -> dict[str, Any]:
    disk = spec.resources.disk_bytes
    return {"sizeLimit": bytes_of(disk)} if disk else {}


def _code(spec: JobSpec) -> list[Mounted]:
    """The archive itself is mounted by the containers that bring and unpack it."""
    source = {"emptyDir": {}} if spec.archive_url else {"configMap": {"name": code_name(spec.archive_digest or "")}}
    archive = {"name": "code-archive", **source}
    code = Mounted({"name": "code", "emptyDir": {}}, [{"name": "code", "mountPath": CODE_FOLDER, "readOnly": True}])
    return [Mounted(archive, []), code]


def keys_mount(spec: JobSpec) -> list[dict[str, Any]]:
    """How a container sees the keys of the store."""
    return [mount for one in spec.secrets if one.purpose == "store" for mount in _secret(one).mounts]


def _secret(secret: SecretFile) -> Mounted:
    items = [{"key": secret.key, "path": secret.key}]
    source = {"secretName": secret.name, "defaultMode": SECRET_MODE, "items": items}
    return _mount({"name": f"secret-{secret.purpose}", "secret": source}, posixpath.dirname(secret.path))


def _mount(volume: dict[str, Any], path: str) -> Mounted:
    return Mounted(volume, [{"name": volume["name"], "mountPath": path, "readOnly": True}])


def _claims(spec: JobSpec) -> list[Mounted]:
    """One volume for each claim, however often it is mounted."""
    claims = list(dict.fromkeys(volume.claim for volume in spec.volumes))
    found = []
    for number, claim in enumerate(claims):
        name = f"claim-{number}"
        here = [volume for volume in spec.volumes if volume.claim == claim]
        mounts = [_claim_mount(name, volume.path, volume.read_only) for volume in here]
        found.append(Mounted({"name": name, "persistentVolumeClaim": {"claimName": claim}}, mounts))
    return found


def _claim_mount(name: str, path: str, read_only: bool) -> dict[str, Any]:
    return {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}
