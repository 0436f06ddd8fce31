"""What a cluster could not run, or would lose: refused before anything is sent."""

from __future__ import annotations

import posixpath
import re

from orchestrator.cluster_config import ClusterConfig
from orchestrator.config import RunConfig, process_range
from orchestrator.errors import ConfigError
from orchestrator.options import CodeSource, JobKind, TrackingMode, Where
from orchestrator.plain import to_dict
from orchestrator.rules import require
from orchestrator.secrets import FORM, KEYS, parse_reference, require_no_secrets

OURS = ("/etc/orchestrator", "/opt/orchestrator", "/dev/shm")
"""Folders of a pod in which nothing of a user's is mounted."""
WRITABLE = ("/tmp", "/home/user")
"""Folders of a pod that are empty at its start and may hold mounts."""
SET_BY_US = (
    "HOME", "JOB_COMPLETION_INDEX", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK",
    "NUM_NODES", "PATH", "PYTHONPATH", "PYTHONSAFEPATH", "RANK", "TERMINATION_LOG", "WORLD_SIZE",
)  # fmt: skip
"""Variables by which processes find each other and their code."""
SECRET_NAME = re.compile(r"(?i)(.*_)?(api_?key|(access|secret|private)_key|token|secret|password|passwd|credentials?)")
IMAGE = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")


def require_sendable(config: RunConfig, initial: str | None, archive: str | None, pace_s: float | None) -> None:
    """`initial`: the checkpoint that init_from means; `pace_s`: seconds of a step and a save, where known."""
    cluster = config.cluster
    assert cluster.where is not Where.local, "what runs here is not sent"
    if cluster.where is Where.kubernetes:
        require_pod(cluster)
        _require_names(config)
    else:
        _require_env(cluster)
    _require_processes(config)
    _require_code(cluster, archive)
    _require_places(config, initial)
    _require_references(config)
    require_no_secrets(to_dict(config))
    _require_grace(cluster, pace_s)


def require_pod(cluster: ClusterConfig) -> None:
    """What any pod needs, whatever it runs."""
    _require_image(cluster)
    _require_mounts(cluster)
    _require_env(cluster)


def _require_image(cluster: ClusterConfig) -> None:
    key, image = "cluster.image", cluster.image
    way_out = f"{key}=REGISTRY/NAME@sha256:DIGEST; k8s/image/Dockerfile builds one"
    if image is None:
        raise ConfigError(key, image, "is what the pods start from, and there is none", way_out)
    if cluster.allow_tag and "@" not in image:
        require(re.fullmatch(r"\S+", image) is not None, key, image, "must be the name of an image", way_out)
        return
    rule = "must end in the image's digest: another image may have the same tag at the next attempt"
    require(IMAGE.fullmatch(image) is not None, key, image, rule, f"{way_out}; or cluster.allow_tag=true")


def _require_names(config: RunConfig) -> None:
    rule = "must begin with a letter on Kubernetes, where it also names a service"
    require(config.name[0].isalpha(), "name", config.name, rule, f"name=run-{config.name}"[:36].rstrip("-"))
    python = config.cluster.python
    require(
        config.cluster.kind is not JobKind.rayjob or re.fullmatch(r"[\w./+-]+", python) is not None,
        "cluster.python",
        python,
        "goes through a shell in a RayJob, so only letters, digits and ./_+- may stand in it",
        "give the interpreter a plain path in the image",
    )


def _require_mounts(cluster: ClusterConfig) -> None:
    """No claim hides what the pods need, and nothing of ours hides a claim."""
    for volume in cluster.volumes:
        path = posixpath.normpath(volume.path)
        hidden = next((ours for ours in (*OURS, *WRITABLE) if is_below(ours, path)), None)
        within = next((ours for ours in OURS if is_below(path, ours)), None)
        taken = hidden or within
        rule = f"lies where the pods have {taken} of their own"
        require(taken is None, "cluster.volumes", volume.path, rule, "mount the claim elsewhere, e.g. at /data")


def _require_processes(config: RunConfig) -> None:
    compute, cluster = config.compute, config.cluster
    key, number, nodes = "compute.num_processes", compute.num_processes, compute.num_nodes
    reach = process_range(number)
    if reach is None:
        rule = "counts the GPUs of this machine, not those of a cluster"
        raise ConfigError(key, number, rule, f"{key}={nodes}, or as many as compute.num_nodes = {nodes} have GPUs")
    low, high = reach
    elastic = cluster.where is Where.ray or cluster.kind is JobKind.rayjob
    rule = f"varies, which cluster.kind = {cluster.kind.name} cannot"
    require(low == high or elastic, key, number, rule, f"{key}={high}, or cluster.kind=rayjob")
    rule = f"cannot be spread evenly over compute.num_nodes = {nodes}"
    way_out = f"{key}={max(1, high // nodes) * nodes}"
    require(high % nodes == 0 and low % nodes == 0, key, number, rule, way_out)


def _require_code(cluster: ClusterConfig, archive: str | None) -> None:
    sent = cluster.code is CodeSource.archive
    assert sent == (archive is not None), f"cluster.code = {cluster.code.name} with the archive {archive}"


def _require_places(config: RunConfig, initial: str | None) -> None:
    """Every file lies where all nodes find it, and the run's folder where it outlives them."""
    if "://" in config.runs_dir:
        _require_store(config, config.runs_dir)
    else:
        _require_place(config, "runs_dir", config.runs_dir, writable=True)
    inputs = {
        "data.train": config.data.train,
        "data.val": config.data.val,
        "model.weights": config.model.weights,
        "init_from": initial,
    }
    for key, place in inputs.items():
        if place is not None:
            _require_place(config, key, place)
    mirror = config.checkpointing.mirror
    if mirror is not None:
        _require_place(config, "checkpointing.mirror", mirror, writable=True)


def _require_store(config: RunConfig, place: str) -> None:
    """An object store as the place of runs: for nodes whose launchers are ours."""
    key, cluster, mirror = "runs_dir", config.cluster, config.checkpointing.mirror
    known = re.fullmatch(r"(s3|gs|az)://[^/]+(/.*)?", place) is not None
    require(known, key, place, "is neither a folder nor a store of s3, gs or az", f"e.g. {key}=s3://BUCKET/runs")
    of_ray = cluster.where is Where.ray or cluster.kind is JobKind.rayjob
    rule = "is an object store, and the processes of Ray meet in a folder that all of them see"
    require(not of_ray, key, place, rule, f"{key}=/PATH on such a disk; checkpointing.mirror={place}")
    rule = f"is another place for what runs_dir = {place} keeps already"
    require(mirror is None, "checkpointing.mirror", mirror, rule, "leave it out")


def _require_place(config: RunConfig, key: str, place: str, writable: bool = False) -> None:
    path = place.removeprefix("file://")
    if "://" in path or path.startswith("pipe:"):
        return
    rule = "is relative to a folder of this machine, which the nodes do not have"
    require(path.startswith("/"), key, place, rule, _way_out(config.cluster, key, writable))
    if config.cluster.where is Where.kubernetes:
        ok = any(is_below(path, one.path) and not (writable and one.read_only) for one in config.cluster.volumes)
        rule = f"lies on no {'writable ' if writable else ''}volume of cluster.volumes, so the nodes do not share it"
        require(ok, key, place, rule, _way_out(config.cluster, key, writable))


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies in it; both absolute."""
    path, folder = posixpath.normpath(path), posixpath.normpath(folder)
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _way_out(cluster: ClusterConfig, key: str, writable: bool) -> str:
    if cluster.where is Where.ray:
        return f"{key}=/PATH on a file system that all nodes share" + ("" if writable else ", or an URL")
    known = [one.path for one in cluster.volumes if not (writable and one.read_only)]
    if known:
        return f"{key}={known[0].rstrip('/')}/..." + ("" if writable else ", or an URL")
    name = key.replace("_", "-").partition(".")[0]
    claim = f"{{claim: {name}, path: /{name}, read_only: {str(not writable).lower()}}}"
    store = f"; or {key}=s3://BUCKET/runs" if key == "runs_dir" else ""
    return f"e.g. 'cluster.volumes=[{claim}]' {key}=/{name}{store}"


def _require_references(config: RunConfig) -> None:
    tracking = config.tracking
    if tracking.mode is TrackingMode.online and tracking.secret is None:
        form = "NAME/KEY" if config.cluster.where is Where.kubernetes else "/PATH on the nodes"
        rule = "needs the API key on the cluster, and tracking.secret does not say where it is"
        raise ConfigError("tracking", "online", rule, f"tracking.secret={form}, or tracking=offline")
    every = {"tracking": tracking.secret, "store": config.cluster.store_secret}
    for purpose, reference in every.items():
        if reference is None:
            continue
        named = parse_reference(purpose, reference) is not None
        wanted = config.cluster.where is Where.kubernetes
        other = "a file of a machine, which pods do not have" if wanted else "a secret of Kubernetes, which Ray has not"
        require(named == wanted, KEYS[purpose], reference, f"is {other}", f"give the {FORM}, as the cluster has it")


def _require_env(cluster: ClusterConfig) -> None:
    """Whoever may read the cluster's objects reads the variables."""
    for entry in cluster.env:
        name, _, value = entry.partition("=")
        rule = "is set by the launcher"
        require(name not in SET_BY_US, "cluster.env", name, rule, "leave it out")
        rule = "is named like a secret, and anybody who sees the job may read it"
        way_out = "tracking.secret or cluster.store_secret name a file or secret that holds it"
        shown = SECRET_NAME.fullmatch(name) is None or value.startswith("/")
        require(shown, "cluster.env", f"{name}=(hidden)", rule, way_out)


def _require_grace(cluster: ClusterConfig, pace_s: float | None) -> None:
    rule = f"is over before a step and a save are, which take {pace_s or 0:.0f} s together"
    way_out = f"cluster.grace_s={2 * (pace_s or 0):.0f}"
    require(pace_s is None or pace_s < cluster.grace_s, "cluster.grace_s", cluster.grace_s, rule, way_out)
