"""The schema of `cluster`: where a run goes, what its workers get, when it starts again."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.options import CodeSource, JobKind, Placement, Spread, Where
from orchestrator.rules import INF, require, require_range

NAME = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
LABEL = r"([A-Za-z0-9.-]+/)?[A-Za-z0-9]([-\w.]*[A-Za-z0-9])?"
PAIRS = {
    "prices": (r".+=\d+(\.\d+)?", "must read name=price", "e.g. cluster.prices=['cpu=0.04']"),
    "env": (r"[A-Za-z_]\w*=[^\0]*", "must read NAME=VALUE", "e.g. cluster.env=['NCCL_DEBUG=WARN']"),
    "node_selector": (
        rf"{LABEL}=({LABEL})?", "must read label=value", "e.g. cluster.node_selector=['pool=a100']"
    ),
    "tolerations": (
        rf"{LABEL}(=[-\w.]*)?:(NoSchedule|PreferNoSchedule|NoExecute)",
        "must read key:Effect or key=value:Effect",
        "e.g. cluster.tolerations=['nvidia.com/gpu:NoSchedule']",
    ),
    "pull_secrets": (NAME, "must be the name of a secret", "e.g. cluster.pull_secrets=[registry]"),
}  # fmt: skip
"""What each entry of a list looks like, the rule in words, and an example."""
NAMES = ("namespace", "queue", "priority", "service_account")


@dataclass(kw_only=True, slots=True)
class VolumeConfig:
    """A claim that all nodes of a run mount at the same path."""

    claim: str
    """Name of a PersistentVolumeClaim."""
    path: str
    """Absolute path in the containers."""
    read_only: bool

    def __post_init__(self) -> None:
        key, way_out = "cluster.volumes", "e.g. cluster.volumes=[{claim: data, path: /data, read_only: true}]"
        require(re.fullmatch(NAME, self.claim) is not None, key, self.claim, "must be the name of a claim", way_out)
        ok = self.path.startswith("/") and len(self.path) > 1 and not {"..", "."} & set(self.path.split("/"))
        require(ok and ":" not in self.path, key, self.path, "must be an absolute path without dots or colons", way_out)


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Where the job runs, what its workers get and how often it may start again."""

    where: Where
    max_restarts: int
    """Starts after the first one, for failures that a retry can mend."""
    grace_s: float
    """Seconds between a request to stop and the kill."""
    backoff_s: float
    """Pause before the second restart in a row without progress; it doubles from one to the next."""
    hang_start_s: float
    """Seconds without a sign of life after which a rank that starts counts as hung."""
    hang_step_s: float
    """The same between two steps."""
    hang_validation_s: float
    """The same between two batches of an evaluation."""
    hang_save_s: float
    """The same while a checkpoint is saved."""
    prices: list[str]
    """Price of a process's hour by the name of its device, e.g. ['cpu=0.04','NVIDIA H100 80GB HBM3=2.9']."""
    currency: str
    canary: bool
    """On several nodes: the first one tries three steps and a resume alone before the run begins."""
    # What reaches the workers of a cluster.
    image: str | None
    """Container image by digest: registry/name@sha256:DIGEST."""
    allow_tag: bool
    """Take an image without a digest, which may be another one at the next attempt."""
    python: str
    """The interpreter in the image, or on the nodes of a Ray cluster, that has the requirements."""
    pull_secrets: list[str]
    """Secrets with which the nodes fetch the image."""
    code: CodeSource
    code_files: list[str]
    """Files and folders besides those that git tracks, relative to the checkout."""
    code_store: str | None
    """Where an archive of the code goes that is too large for an object of Kubernetes, e.g. s3://BUCKET/code; none: to
    runs_dir or checkpointing.mirror, if one is a store."""
    volumes: list[VolumeConfig]
    env: list[str]
    """Variables of the workers, NAME=VALUE; never secrets, which anybody may read here."""
    store_secret: str | None
    """Where the keys of the object store are (lines NAME=VALUE): NAME/KEY of a Kubernetes secret, or a file's path."""
    cpus_per_process: float
    memory_gib_per_process: float
    disk_gib: float
    """Of a node's own disk, for the cache of shards and temporary files."""
    gpu_resource: str
    """How the cluster counts GPUs; one for each process where compute.device is not cpu."""
    # Kubernetes.
    kind: JobKind
    context: str | None
    """Of the kubeconfig; none: its current one, or the service account where this runs in a pod."""
    namespace: str | None
    """None: that of the context."""
    queue: str | None
    """Kueue's LocalQueue."""
    priority: str | None
    """PriorityClass of the pods; with a queue, Kueue's WorkloadPriorityClass."""
    service_account: str | None
    node_selector: list[str]
    """label=value that a node must have."""
    tolerations: list[str]
    """Taints that the pods bear besides those of GPUs, key:Effect or key=value:Effect."""
    spread: Spread
    topology: str
    """Label of nodes that `spread` is about, e.g. kubernetes.io/hostname or topology.kubernetes.io/zone."""
    spot: list[str]
    """Taints of spot nodes that the pods bear as well, in the form of `tolerations`."""
    rdma: str | None
    """Resource of an RDMA device for each node, e.g. rdma/hca; needs a namespace that allows IPC_LOCK."""
    user_id: int
    """Of the containers; 0 is refused."""
    lost_node_s: float
    """Seconds that pods stay on a node that does not answer."""
    start_deadline_s: float
    """Seconds after which a run that has not started a process is ended; 0 = never."""
    deadline_s: float
    """Seconds after which the cluster ends the run, whatever it does; 0 = never."""
    ttl_s: float
    """Seconds that the objects of an ended run stay; 0 = until `orchestrator rm`."""
    # Ray.
    address: str | None
    """Of the dashboard, e.g. http://127.0.0.1:8265."""
    token_file: str | None
    """File with the cluster's token; none: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""
    insecure: bool
    """Allow a cluster without tokens, or http to another machine."""
    placement: Placement

    def __post_init__(self) -> None:
        require_range(
            self,
            "cluster",
            max_restarts=(0, INF),
            grace_s=(1, INF),
            backoff_s=(0, INF),
            hang_start_s=(1, INF),
            hang_step_s=(1, INF),
            hang_validation_s=(1, INF),
            hang_save_s=(1, INF),
            cpus_per_process=(0.1, 1024),
            memory_gib_per_process=(0.1, 65536),
            disk_gib=(0, INF),
            user_id=(1, 2**31 - 1),
            lost_node_s=(0, INF),
            start_deadline_s=(0, INF),
            deadline_s=(0, INF),
            ttl_s=(0, INF),
        )
        for field, (form, rule, example) in PAIRS.items():
            for entry in getattr(self, field):
                require(re.fullmatch(form, entry) is not None, f"cluster.{field}", entry, rule, example)
        for entry in self.spot:
            form, rule, example = PAIRS["tolerations"]
            require(re.fullmatch(form, entry) is not None, "cluster.spot", entry, rule, example)
        for field in NAMES:
            value = getattr(self, field)
            ok = value is None or re.fullmatch(NAME, value) is not None
            require(ok, f"cluster.{field}", value, "must be the name of an object", f"e.g. cluster.{field}=training")
        known = self.code_store is None or re.fullmatch(r"(s3|gs|az)://[^/]+(/.*)?", self.code_store) is not None
        rule = "must be a store of s3, gs or az"
        require(known, "cluster.code_store", self.code_store, rule, "e.g. cluster.code_store=s3://BUCKET/code")
        paths = [volume.path for volume in self.volumes]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        require(twice is None, "cluster.volumes", twice, "is mounted twice", "one claim for each path")
