"""``orchestrator shards make ... cluster=kubernetes``: from what was typed to the job that does it there."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from orchestrator.cli.console import given_options, note
from orchestrator.options import CodeSource

if TYPE_CHECKING:
    from orchestrator.cluster.shard_job import Packing
    from orchestrator.cluster_config import ClusterConfig


def send(cluster: ClusterConfig, args: argparse.Namespace) -> int:
    """Show, write or submit it; with `--follow` its log comes here and its exit code is this command's."""
    from orchestrator.bundle import imported_code
    from orchestrator.cli.submit import Parcel, deliver
    from orchestrator.cluster.code import archive_of
    from orchestrator.cluster.kubernetes.code_store import placed
    from orchestrator.cluster.shard_job import shard_job_of

    packing, code = packing_of(args), imported_code()
    sent = cluster.code is CodeSource.archive
    shard_job_of(cluster, packing, "" if sent else None, code)  # refuses before seconds go into the archive
    archive = archive_of(cluster.code_files) if sent else None
    spec = shard_job_of(cluster, packing, archive.digest if archive else None, code)
    if args.workers is None:
        note("packs in 1 process; --workers N gets N times cluster.cpus_per_process and memory_gib_per_process")
    return deliver(Parcel(placed(spec, archive, cluster, cluster.code_store), archive, cluster, ""), args)


def packing_of(args: argparse.Namespace) -> Packing:
    """Raises ConfigError for options that could not be meant."""
    from orchestrator.cli.shards_make import words_of
    from orchestrator.cluster.shard_job import Packing
    from orchestrator.data.plan import MakeOptions
    from orchestrator.data.sources import TORCHVISION, SourceOptions

    SourceOptions(**given_options(args, SourceOptions))
    MakeOptions(**given_options(args, MakeOptions))
    torchvision = args.source.startswith(TORCHVISION)
    return Packing(
        source=None if torchvision or _is_program(args.source) else args.source,
        out=args.out,
        root=args.root if torchvision else None,
        writes_root=args.download,
        words=tuple(words_of(args, without=("workers",))),
        workers=1 if args.workers is None else args.workers,
    )


def _is_program(source: str) -> bool:
    """What makes its images itself needs no file there; an entry point must be one of the image's, too."""
    from orchestrator.data.datasets import entry_point_names
    from orchestrator.data.sources import BUILT_IN

    return source in (*BUILT_IN, *entry_point_names())
