"""The pods of a run: those that train, and those that a Ray cluster needs besides."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import Any

from orchestrator.cluster.job import CODE_FOLDER, END_S, MASTER_PORT, JobSpec, Resources
from orchestrator.cluster.kubernetes import fetch, placing, unpack
from orchestrator.cluster.kubernetes.mounts import ARCHIVE, ARCHIVE_FOLDER, HOME, bytes_of, keys_mount, mounted
from orchestrator.cluster.kubernetes.resources import PRODUCT, RUN
from orchestrator.cluster.kubernetes.templates import template
from orchestrator.data import objects

COMPONENT = "app.kubernetes.io/component"
"""Label that tells the pods of a run apart: `node` trains."""
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
"""Number of a pod in an Indexed Job, also in one that a JobSet or TrainJob made."""
TERMINATION_LOG = "/dev/termination-log"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Part:
    """How a pod differs from the others of its run."""

    component: str
    container: str
    command: tuple[str, ...]
    env: tuple[dict[str, Any], ...]
    resources: Resources
    subdomain: str | None = None
    pre_stop: tuple[str, ...] = ()
    """What runs in the container when it is told to go, before any signal."""


def node(spec: JobSpec, master: str, subdomain: str | None) -> dict[str, Any]:
    """A pod that trains; `master` is the name of the first one, `subdomain` that of a service of ours."""
    meeting = {"MASTER_ADDR": master, "MASTER_PORT": str(MASTER_PORT), "NUM_NODES": str(spec.num_nodes)}
    rank = {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}}
    part = Part("node", "node", spec.command, (*_pairs(meeting), rank), spec.resources, subdomain)
    return pod(spec, part)


def pod(spec: JobSpec, part: Part) -> dict[str, Any]:
    """A pod template."""
    volumes, mounts = mounted(spec, part.resources.shm_bytes)
    ours = labels(spec)
    trains = part.component == "node"
    security = _security(part.resources)
    return template(
        "pod",
        labels={**ours, COMPONENT: part.component},
        annotations=provenance(spec),
        subdomain=part.subdomain,
        service_account=spec.service_account,
        priority_class=None if spec.queue else spec.priority,
        grace_s=ceil(spec.grace_s + END_S),
        pull_secrets=[{"name": name} for name in spec.pull_secrets],
        node_selector=spec.node_selector,
        affinity=placing.affinity(spec, trained(spec)) if trains else None,
        spread=placing.spread(spec, trained(spec)) if trains else None,
        tolerations=placing.tolerations(spec),
        user_id=spec.user_id,
        init_containers=_setup(spec),
        container=part.container,
        image=spec.image,
        command=[verbatim(word) for word in part.command],
        home=HOME,
        env=[*part.env, *_env(spec)],
        resources=requirements(part.resources),
        pre_stop=list(part.pre_stop),
        termination_log=TERMINATION_LOG,
        container_security=security,
        mounts=mounts,
        volumes=volumes,
    )


def labels(spec: JobSpec) -> dict[str, str]:
    """Of every object of a run."""
    name, value = PRODUCT.split("=")
    return {name: value, RUN: spec.run_id}


def trained(spec: JobSpec) -> dict[str, str]:
    """Labels of the pods that train, and of no other."""
    return {RUN: spec.run_id, COMPONENT: "node"}


def provenance(spec: JobSpec) -> dict[str, str]:
    """What the objects were made from."""
    found = {
        "orchestrator/config": spec.bundle["config_hash"],
        "orchestrator/code": spec.code_digest,
        "orchestrator/archive": spec.archive_digest,
    }
    return {key: value for key, value in found.items() if value}


def requirements(resources: Resources) -> dict[str, Any]:
    """Requests equal limits, but for the CPU: a limit on it would only make ranks wait for the slowest."""
    limits = {"memory": bytes_of(resources.memory_bytes)}
    if resources.disk_bytes:
        limits["ephemeral-storage"] = bytes_of(resources.disk_bytes)
    if resources.gpus:
        limits[resources.gpu_resource] = str(resources.gpus)
    if resources.rdma:
        limits[resources.rdma] = "1"
    return {"requests": {"cpu": cpus_of(resources.cpus), **limits}, "limits": limits}


def cpus_of(count: float) -> str:
    thousandths = round(count * 1000)
    return f"{thousandths}m" if thousandths % 1000 else str(thousandths // 1000)


def _security(resources: Resources) -> dict[str, Any]:
    return template("container_security", capabilities=["IPC_LOCK"] if resources.rdma else None)


def _env(spec: JobSpec) -> list[dict[str, str]]:
    """What every container of a run has; a user's own variables come last."""
    ours = {"HOME": HOME, "TERMINATION_LOG": TERMINATION_LOG, "PYTHONSAFEPATH": "1"}
    if spec.archive_digest:
        ours["PYTHONPATH"] = CODE_FOLDER
    if posixpath.isabs(spec.python):  # the programs beside the interpreter, e.g. ray
        ours["PATH"] = f"{posixpath.dirname(spec.python)}:{SEARCH_PATH}"
    return _pairs({**ours, **spec.env})


def _pairs(variables: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": verbatim(value)} for name, value in variables.items()]


def verbatim(text: str) -> str:
    """The kubelet puts variables in the place of `$(NAME)`."""
    return text.replace("$(", "$$(")


def _setup(spec: JobSpec) -> list[dict[str, Any]]:
    """What runs before the node starts: the image's interpreter, isolated from everything else."""
    if not spec.archive_digest:
        return []
    lean = replace(spec.resources, gpus=0, rdma=None)
    shared = {
        "image": spec.image,
        "resources": requirements(lean),
        "container_security": _security(lean),
        "archive_folder": ARCHIVE_FOLDER,
    }
    archive = f"{ARCHIVE_FOLDER}/{ARCHIVE}"
    unpacking = _isolated(spec, unpack, archive, spec.archive_digest, CODE_FOLDER)
    last = template("unpack", command=unpacking, code_folder=CODE_FOLDER, **shared)
    if not spec.archive_url:
        return [last]
    keys = next((secret.path for secret in spec.secrets if secret.purpose == "store"), "")
    fetching = _isolated(spec, fetch, archive, spec.archive_url, keys, _text(objects))
    return [template("fetch", command=fetching, env=_pairs(spec.env), keys=keys_mount(spec), **shared), last]


def _isolated(spec: JobSpec, program: ModuleType, *arguments: str) -> list[str]:
    """A command that runs the text of a program of ours, which need not be in the image."""
    return [verbatim(word) for word in (spec.python, "-I", "-c", _text(program), *arguments)]


def _text(program: ModuleType) -> str:
    return Path(str(program.__file__)).read_text()
