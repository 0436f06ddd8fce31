"""The job as data: what a cluster is to run, from the frozen bundle and nothing else. Rendering it is pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.options import JobKind, Spread

RUN_FOLDER = "/etc/orchestrator/run"
"""Where a pod finds run.json."""
CODE_FOLDER = "/opt/orchestrator/code"
"""Where the archive of the code is unpacked; first on the path."""
SECRETS_FOLDER = "/etc/orchestrator/secrets"
MASTER_PORT = 29500
"""On the first node, where nothing else listens: the launchers of all nodes meet here."""


@dataclass(frozen=True, slots=True)
class SecretFile:
    """One key of a secret as a file that only the process in need reads."""

    purpose: str
    """`tracking` or `store`."""
    name: str
    key: str

    @property
    def path(self) -> str:
        return f"{SECRETS_FOLDER}/{self.purpose}/{self.key}"


@dataclass(frozen=True, slots=True)
class Volume:
    """A claim and where all nodes mount it."""

    claim: str
    path: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one node of the run; requests and limits are equal but for the CPU, which has no limit."""

    cpus: float
    memory_bytes: int
    """With what lies in /dev/shm."""
    shm_bytes: int
    disk_bytes: int
    gpus: int
    gpu_resource: str
    rdma: str | None


@dataclass(frozen=True, slots=True)
class JobSpec:
    """Everything that is sent."""

    run_id: str
    """Also the name of every object of the run."""
    bundle: dict[str, Any]
    """run.json as the workers load it."""
    image: str | None
    pull_secrets: tuple[str, ...]
    python: str
    command: tuple[str, ...]
    """What each node runs: the interpreter, the module, run.json."""
    code_digest: str
    """sha256 of the package's source, which every rank compares with what it imported."""
    archive_digest: str | None
    """sha256 of the archive; None: the code is the image's."""
    num_nodes: int
    processes_per_node: int
    resources: Resources
    env: dict[str, str]
    secrets: tuple[SecretFile, ...]
    volumes: tuple[Volume, ...]
    kind: JobKind
    queue: str | None
    priority: str | None
    service_account: str | None
    node_selector: dict[str, str]
    tolerations: tuple[str, ...]
    spread: Spread
    topology: str
    user_id: int
    max_restarts: int
    grace_s: float
    lost_node_s: float
    start_deadline_s: float
    deadline_s: float
    ttl_s: float
