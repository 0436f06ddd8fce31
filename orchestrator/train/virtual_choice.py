"""Which virtual ranks an attempt has: what was asked for, or what the run has had so far."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.bundle import Bundle
from orchestrator.files import read_json, write_json
from orchestrator.train.virtual import Choice, choose

if TYPE_CHECKING:
    from orchestrator.train.process import Rank

log = logging.getLogger(__name__)
SCHEMA = 1
OFF = 0


def agree_on_virtual_ranks(bundle: Bundle, rank: Rank, manifest: Mapping[str, Any]) -> int | None:
    """Slices of a step, the same on all ranks; `manifest` is that of the checkpoint which the attempt goes on from.

    None: plain all-reduce. Raises ConfigError where a number was asked for that the processes cannot share.
    """
    import torch  # here and not above: the launcher needs only what a run has noted
    import torch.distributed as dist

    asked, world = bundle.config.compute.virtual_ranks, rank.world
    if asked != "auto":
        return choose(asked, None, world.world_size).virtual_ranks
    agreed = torch.zeros(1, dtype=torch.int64)
    if world.is_first:
        agreed[0] = _choose_first(bundle.folder, manifest, world.world_size) or OFF
    if rank.control is not None:
        dist.broadcast(agreed, 0, group=rank.control)
    return int(agreed) or None


def _choose_first(folder: Path, manifest: Mapping[str, Any], world_size: int) -> int | None:
    recorded = Choice(manifest["virtual_ranks"]) if "virtual_ranks" in manifest else read_choice(folder)
    choice = choose("auto", recorded, world_size)
    if choice.notice:
        log.warning("compute.virtual_ranks = auto: %s", choice.notice)
    write_json(folder / "virtual_ranks.json", {"schema": SCHEMA, "virtual_ranks": choice.virtual_ranks})
    return choice.virtual_ranks


def read_choice(folder: Path) -> Choice | None:
    """What the last attempt of a run chose under `auto`; None before the first."""
    path = folder / "virtual_ranks.json"
    return Choice(read_json(path)["virtual_ranks"]) if path.exists() else None


def slices_of(asked: str, folder: Path) -> int | None:
    """What limits the processes of the next attempt, as `largest_world` takes it."""
    if asked.isdecimal():
        return int(asked)
    known = read_choice(folder) if asked == "auto" else None
    return known.virtual_ranks if known else None
