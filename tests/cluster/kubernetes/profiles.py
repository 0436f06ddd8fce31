"""Runs as people submit them, without what differs between machines and versions of the config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from orchestrator.bundle import Bundle, freeze
from orchestrator.cluster.job import JobSpec, job_of
from orchestrator.cluster.shard_job import Packing, shard_job_of
from orchestrator.compose import compose
from orchestrator.options import JobKind

IMAGE = f"registry.example/vision/train@sha256:{'1' * 64}"
CODE, ARCHIVE, CONFIG = "c" * 64, "a" * 64, "f" * 64
RUN = "digits-0123abcd"
KINDS = [kind for kind in JobKind if kind is not JobKind.auto]
SHARED = ("cluster=kubernetes", f"cluster.image={IMAGE}", "runs_dir=/runs", "data_dir=/data")
VOLUMES = "cluster.volumes=[{claim: runs, path: /runs, read_only: false}, {claim: data, path: /data, read_only: true}]"
PROFILES = {
    "cpu2": (*SHARED, VOLUMES, "compute=cpu2", "compute.num_nodes=2", "cluster.code=image", "cluster.spread=any"),
    "gpu_queue_spot_rdma": (
        *SHARED, VOLUMES, "compute=gpu", "compute.num_processes=16", "compute.num_nodes=2", "cluster.code=image",
        "cluster.queue=training", "cluster.priority=high", "cluster.spot=['cloud.example/spot=true:NoSchedule']",
        "cluster.rdma=rdma/hca", "cluster.spread=pack", "cluster.topology=topology.kubernetes.io/zone",
        "cluster.node_selector=['pool=a100']", "cluster.tolerations=['team:NoExecute']", "cluster.deadline_s=3600",
        "data.num_workers=8", "data.image_size=224", "data.eval_resize=256", "recipe.global_batch_size=4096",
        "cluster.cpus_per_process=7.5", "cluster.memory_gib_per_process=32", "cluster.grace_s=120",
    ),
    "archive_secrets_volumes": (
        *SHARED, "compute=cpu2", "compute.num_nodes=2", "tracking=online", "tracking.secret=wandb/api-key",
        "cluster.store_secret=store/keys", "cluster.pull_secrets=[registry]", "cluster.priority=batch",
        "cluster.service_account=runner", "cluster.python=/opt/venv/bin/python", "cluster.env=['NCCL_DEBUG=WARN']",
        "cluster.volumes=[{claim: work, path: /runs, read_only: false}, {claim: data, path: /data, read_only: true},"
        " {claim: work, path: /home/user/.cache, read_only: false}]",
    ),
}  # fmt: skip


@cache
def bundle_of(*overrides: str) -> Bundle:
    return freeze(compose(overrides))


def spec_of(*overrides: str) -> JobSpec:
    """The job of these overrides as it is sent."""
    bundle = bundle_of(*overrides)
    return job_of(bundle, ARCHIVE if bundle.config.cluster.code.name == "archive" else None)


SHARDS, STORED = "shards", "code_in_a_store"
"""A profile that is no training, and one whose code no object of the cluster takes."""


def packing() -> JobSpec:
    """`shards make` with two processes, in a queue, from one claim to another."""
    keys = (
        *SHARED,
        "cluster.queue=training",
        "cluster.pull_secrets=[registry]",
        "cluster.volumes=[{claim: photos, path: /photos, read_only: true},"
        " {claim: data, path: /data, read_only: false}]",
    )
    words = ("/photos", "/data/photos", "--max-side", "512", "--on-bad", "skip")
    what = Packing(source="/photos", out="/data/photos", root=None, writes_root=False, words=words, workers=2)
    return shard_job_of(bundle_of(*keys).config.cluster, what, ARCHIVE, CODE)


def profile(name: str) -> JobSpec:
    """Without the config itself, whose keys are no matter of the manifests."""
    if name == STORED:
        url = f"s3://code/of-ours/code-{ARCHIVE}.tar.gz"
        return replace(profile("archive_secrets_volumes"), archive_url=url)
    if name == SHARDS:
        return replace(packing(), run_id=RUN, bundle={"config_hash": CONFIG})
    bundle = {"config_hash": CONFIG, "versions": {"ray": "2.60.0"}}
    return replace(spec_of(*PROFILES[name]), run_id=RUN, bundle=bundle, code_digest=CODE)


def pods_of(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in an object."""
    if isinstance(node, dict):
        if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            yield node
        for value in node.values():
            yield from pods_of(value)
    elif isinstance(node, list):
        for item in node:
            yield from pods_of(item)
