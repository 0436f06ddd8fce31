"""The job as data: what a cluster is to run, from the frozen bundle and nothing else. Rendering it is pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from orchestrator.bundle import Bundle, content_of
from orchestrator.cluster.job_rules import require_sendable
from orchestrator.cluster_config import ClusterConfig
from orchestrator.config import RunConfig, process_range
from orchestrator.options import Device, JobKind, Spread, Where
from orchestrator.secrets import parse_reference, path_of

RUN_FOLDER = "/etc/orchestrator/run"
"""Where a pod finds run.json."""
CODE_FOLDER = "/opt/orchestrator/code"
"""Where the archive of the code is unpacked; first on the path."""
MASTER_PORT = 29500
"""On the first node, where nothing else listens: the launchers of all nodes meet here."""
NODE, DRIVER = "jobs.node", "jobs.ray_driver"
"""What a cluster starts: the launcher of each node, or one driver for all that Ray places."""
TRAINS, PACKS = "node", "shards"
"""What pods do, as their label says it."""
GIB = 1 << 30
LEAST_SHM = 64 << 20
END_S = 15.0
"""Beyond `cluster.grace_s`, before a cluster kills: for a launcher to end ranks that did not save, and to say so."""
SPARE_BATCHES = 2
"""Beside those that a loader process keeps ready: one is being filled, one is being used."""


@dataclass(frozen=True, slots=True)
class SecretFile:
    """One key of a secret as a file that only the process in need reads."""

    purpose: str
    """`tracking` or `store`."""
    name: str
    key: str

    @property
    def path(self) -> str:
        return str(path_of(self.purpose, f"{self.name}/{self.key}"))


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
    """0: as much as the node gives."""
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
    """Those of spot nodes among them."""
    spread: Spread
    topology: str
    user_id: int
    max_restarts: int
    grace_s: float
    lost_node_s: float
    start_deadline_s: float
    deadline_s: float
    ttl_s: float
    avoid_nodes: tuple[str, ...] = ()
    """Names of nodes that a rank reported unfit (44)."""
    archive_url: str | None = None
    """Where in an object store the archive is; None: in an object of the cluster."""
    component: str = TRAINS
    """What the pods do."""


def job_of(
    bundle: Bundle, archive_digest: str | None, data: Mapping[str, Any] | None = None, pace_s: float | None = None
) -> JobSpec:
    """What `cluster` is to run.

    `data` identifies the shard sets where the submitter could read them; `pace_s`: what a step and a save take
    together, where that is known. Raises ConfigError for what the cluster could not run or would lose.
    """
    config = bundle.config
    cluster = config.cluster
    require_sendable(config, bundle.initial.path if bundle.initial else None, archive_digest, pace_s)
    nodes, processes = config.compute.num_nodes, num_processes(config)
    program = DRIVER if cluster.where is Where.ray else NODE
    return JobSpec(
        run_id=bundle.run_id,
        bundle=content_of(bundle, data or {}),
        kind=cluster.kind,
        command=command_of(cluster.python, program),
        code_digest=bundle.code_digest,
        archive_digest=archive_digest,
        num_nodes=nodes,
        processes_per_node=processes // nodes,
        resources=_resources(config, processes // nodes),
        env=_env(config),
        secrets=_secrets(config),
        **pods_of(cluster),
    )


AS_CONFIGURED = (
    "queue", "priority", "service_account", "spread", "topology", "user_id", "max_restarts", "grace_s",
    "lost_node_s", "start_deadline_s", "deadline_s", "ttl_s", "image", "python",
)  # fmt: skip


def pods_of(cluster: ClusterConfig) -> dict[str, Any]:
    """What any job takes from the config as it stands there."""
    return {
        "pull_secrets": tuple(cluster.pull_secrets),
        "volumes": tuple(Volume(one.claim, one.path, one.read_only) for one in cluster.volumes),
        "node_selector": dict(entry.split("=", 1) for entry in cluster.node_selector),
        "tolerations": (*cluster.tolerations, *cluster.spot),
        **{field: getattr(cluster, field) for field in AS_CONFIGURED},
    }


def command_of(python: str, program: str) -> tuple[str, ...]:
    return (python, "-m", program, f"{RUN_FOLDER}/run.json")


def num_processes(config: RunConfig) -> int:
    """The most processes that the run may have."""
    reach = process_range(config.compute.num_processes)
    assert reach is not None, "auto has been refused"
    return reach[1]


def shm_bytes(config: RunConfig, processes: int) -> int:
    """What the loaders of one node keep in shared memory: a training and an evaluation batch for each slot."""
    data = config.data
    side = max(data.image_size, data.eval_size)
    images = ceil(config.recipe.global_batch_size / num_processes(config)) + config.eval_batch_size
    slots = data.num_workers * (data.prefetch_batches + SPARE_BATCHES)
    return max(LEAST_SHM, processes * slots * images * 3 * side**2)


def _resources(config: RunConfig, processes: int) -> Resources:
    cluster, shm = config.cluster, shm_bytes(config, processes)
    return Resources(
        cpus=cluster.cpus_per_process * processes,
        memory_bytes=round(cluster.memory_gib_per_process * processes * GIB) + shm,
        shm_bytes=shm,
        disk_bytes=round(cluster.disk_gib * GIB),
        gpus=0 if config.compute.device is Device.cpu else processes,
        gpu_resource=cluster.gpu_resource,
        rdma=cluster.rdma,
    )


def _env(config: RunConfig) -> dict[str, str]:
    given = dict(entry.split("=", 1) for entry in config.cluster.env)
    return {"OMP_NUM_THREADS": str(config.compute.threads_per_process), **given}


def _secrets(config: RunConfig) -> tuple[SecretFile, ...]:
    """Those of Kubernetes; the file of another cluster lies on its nodes, where the config says."""
    return tuple(
        SecretFile(purpose, *named)
        for purpose, reference in references(config).items()
        if (named := parse_reference(purpose, reference)) is not None
    )


def references(config: RunConfig) -> dict[str, str]:
    """Where each secret is that the run needs."""
    every = {"tracking": config.tracking.secret, "store": config.cluster.store_secret}
    return {purpose: reference for purpose, reference in every.items() if reference}
