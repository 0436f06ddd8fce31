"""`shards make` as a job of a cluster: one pod that packs what lies on a claim into shards on a claim. Pure."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from dataclasses import dataclass
from math import ceil
from typing import Any

from orchestrator.cluster.job import GIB, LEAST_SHM, PACKS, JobSpec, Resources, pods_of
from orchestrator.cluster.job_rules import is_below, require_pod
from orchestrator.cluster_config import ClusterConfig
from orchestrator.errors import ConfigError
from orchestrator.options import JobKind, Where
from orchestrator.rules import require
from orchestrator.secrets import require_no_secrets

PROGRAM = "jobs.make_shards"
LONGEST_NAME = 24
"""Characters of the folder's name in an id of at most 40."""


@dataclass(frozen=True, slots=True)
class Packing:
    """What is to be packed, as it was typed."""

    source: str | None
    """A path; None for what a program makes."""
    out: str
    root: str | None
    """Where torchvision's data set lies; None for any other source."""
    writes_root: bool
    """It is downloaded first."""
    words: tuple[str, ...]
    """Source, OUT and options, without the number of processes."""
    workers: int


def shard_job_of(cluster: ClusterConfig, packing: Packing, archive_digest: str | None, code_digest: str) -> JobSpec:
    """What the cluster is to run. Raises ConfigError for what it could not run, or would lose with its pod."""
    _require_packable(cluster, packing)
    run_id = id_of(packing)
    return JobSpec(
        run_id=run_id,
        bundle=_content(run_id, packing, code_digest),
        kind=JobKind.job,
        command=(cluster.python, "-m", PROGRAM, *packing.words, "--workers", str(packing.workers)),
        code_digest=code_digest,
        archive_digest=archive_digest,
        num_nodes=1,
        processes_per_node=packing.workers,
        resources=_resources(cluster, packing.workers),
        env={"OMP_NUM_THREADS": "1", **dict(entry.split("=", 1) for entry in cluster.env)},
        secrets=(),
        component=PACKS,
        **pods_of(cluster),
    )


def id_of(packing: Packing) -> str:
    """``shards-FOLDER-XXXXXXXX``: the same source, folder and options are the same job, which goes on."""
    name = re.sub(r"[^a-z0-9]+", "-", posixpath.basename(posixpath.normpath(packing.out)).lower())
    return "-".join(filter(None, ("shards", name.strip("-")[:LONGEST_NAME].strip("-"), _hash(packing)[:8])))


def _hash(packing: Packing) -> str:
    return hashlib.sha256(json.dumps(packing.words).encode()).hexdigest()


def _content(run_id: str, packing: Packing, code_digest: str) -> dict[str, Any]:
    """In the place of a bundle: who looks at the job's ConfigMap finds what it does."""
    asked = {"program": PROGRAM, "arguments": list(packing.words), "out": packing.out}
    return {"schema": 1, "run_id": run_id, "config_hash": _hash(packing), "code_digest": code_digest, **asked}


def _resources(cluster: ClusterConfig, workers: int) -> Resources:
    """A packing process gets what one of a run gets."""
    return Resources(
        cpus=cluster.cpus_per_process * workers,
        memory_bytes=ceil(cluster.memory_gib_per_process * workers * GIB) + LEAST_SHM,
        shm_bytes=LEAST_SHM,
        disk_bytes=round(cluster.disk_gib * GIB),
        gpus=0,
        gpu_resource=cluster.gpu_resource,
        rdma=None,
    )


def _require_packable(cluster: ClusterConfig, packing: Packing) -> None:
    if cluster.where is not Where.kubernetes:
        way_out = "cluster=kubernetes; or type the command where the disk is"
        raise ConfigError("cluster", cluster.where.name, "trains, and packs no shards", way_out)
    require_pod(cluster)
    require_no_secrets({"shards make": list(packing.words)})
    require(packing.workers > 0, "--workers", packing.workers, "must be at least 1", "leave it out for one")
    _require_on_volume(cluster, "OUT", packing.out, writable=True)
    if packing.source is not None:
        _require_on_volume(cluster, "SOURCE", packing.source, writable=False)
    if packing.root is not None:
        _require_on_volume(cluster, "--root", packing.root, packing.writes_root)


def _require_on_volume(cluster: ClusterConfig, key: str, place: str, writable: bool) -> None:
    known = [one.path for one in cluster.volumes if not (writable and one.read_only)]
    what = "writable volume" if writable else "volume"
    rule = f"lies on no {what} of cluster.volumes, {'so it would go with the pod' if writable else 'so no pod sees it'}"
    name = "data" if writable else "source"
    claim = f"'cluster.volumes=[{{claim: {name}, path: /{name}, read_only: {str(not writable).lower()}}}]'"
    way_out = f"{key} below {' or '.join(known)}" if known else f"{key} /{name}/... with {claim}"
    require(any(place.startswith("/") and is_below(place, path) for path in known), key, place, rule, way_out)
