"""A checkpoint for nodes that do not see the first rank's: it comes to them through the group of the ranks."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.files import disk_errors
from orchestrator.train.checkpoint import MANIFEST, open_checkpoint
from orchestrator.train.process import Rank

PIECE = 8 << 20
"""Bytes that travel at once."""


def hand_out(folder: Path, rank: Rank) -> None:
    """Return when every rank sees the checkpoint that the first one has verified; collective.

    Where all see it, as on a shared disk, nothing but its manifest travels. Raises CheckpointError on the rank where
    something else came, NodeError where its disk is full.
    """
    if rank.control is None:
        return
    told: list[Any] = [(folder / MANIFEST).read_bytes() if rank.world.is_first else None]
    dist.broadcast_object_list(told, 0, group=rank.control)
    lacks = torch.tensor([not _has(folder, told[0])], dtype=torch.int64)
    missing = lacks.clone()
    dist.all_reduce(missing, group=rank.control)
    if not int(missing):
        return
    takes = bool(lacks) and rank.world.local_rank == 0
    with disk_errors(folder):
        _pass_on(folder, told[0], rank, takes)
    dist.barrier(group=rank.control)


def _has(folder: Path, manifest: bytes) -> bool:
    try:
        files = json.loads(manifest)["files"]
        same = (folder / MANIFEST).read_bytes() == manifest
        return same and all((folder / name).stat().st_size == facts["bytes"] for name, facts in files.items())
    except OSError:
        return False


def _pass_on(folder: Path, manifest: bytes, rank: Rank, takes: bool) -> None:
    """Every file from the first rank to all; who `takes` puts them in their place once all are there."""
    made = folder.with_name(f".coming_{folder.name}")
    coming = made / folder.name
    if takes:
        shutil.rmtree(made, ignore_errors=True)
        coming.mkdir(parents=True)
        (coming / MANIFEST).write_bytes(manifest)
    for name, facts in json.loads(manifest)["files"].items():
        _pass_file(folder / name, coming / name, facts["bytes"], rank, takes)
    if takes:
        open_checkpoint(coming)
        _put(coming, folder, manifest)
        shutil.rmtree(made)


def _put(coming: Path, folder: Path, manifest: bytes) -> None:
    """A disk may have shown late what another node wrote: that stays."""
    if _has(folder, manifest):
        return
    if folder.exists():
        os.rename(folder, coming.with_name("another"))
    os.rename(coming, folder)


def _pass_file(source: Path, target: Path, size: int, rank: Rank, takes: bool) -> None:
    with ExitStack() as opened:
        reading = opened.enter_context(open(source, "rb")) if rank.world.is_first else None
        writing = opened.enter_context(open(target, "wb")) if takes else None
        for start in range(0, size, PIECE):
            piece = torch.empty(min(PIECE, size - start), dtype=torch.uint8)
            if reading:
                reading.readinto(piece.numpy().data)
            dist.broadcast(piece, 0, group=rank.control)
            if writing:
                writing.write(piece.numpy().data)
