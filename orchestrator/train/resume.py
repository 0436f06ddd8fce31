"""Where an attempt goes on: the newest whole checkpoint of its own run, or a stated refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.bundle import Bundle
from orchestrator.errors import CheckpointError
from orchestrator.plain import to_dict
from orchestrator.train.checkpoint import Checkpoint, newest, read_checkpoint, set_aside, step_folder
from orchestrator.train.fence import Fence
from orchestrator.train.handout import hand_out
from orchestrator.train.mirror import StoreMirror
from orchestrator.train.preflight import Sets, total_steps
from orchestrator.train.process import Rank

NEEDED = ("run_id", "data_digest", "model", "unlogged", "lost")
"""What a manifest must say for a run to go on from it."""


def checkpoints_of(bundle: Bundle) -> Path:
    return bundle.folder / "checkpoints"


def claim(bundle: Bundle, rank: Rank) -> Fence | None:
    """From now on no earlier attempt changes the checkpoints; for the first rank."""
    return Fence(checkpoints_of(bundle), rank.attempt) if rank.world.is_first else None


def open_mirror(bundle: Bundle, fence: Fence | None) -> StoreMirror | None:
    """Claim the mirror, and get its newest checkpoint where none as new is here; for the first rank."""
    settings, root = bundle.config.checkpointing, checkpoints_of(bundle)
    if fence is None or settings.mirror is None:
        return None
    mirror = StoreMirror(f"{settings.mirror.rstrip('/')}/{bundle.run_id}/checkpoints", settings, fence)
    found = newest(root, NEEDED)
    mirror.bring(found.step if found else -1)
    if found:
        mirror.offer()
    return mirror


def resume_point(bundle: Bundle, rank: Rank, sets: Sets) -> Checkpoint | None:
    """The newest whole checkpoint; the first rank chooses and verifies, the others follow, on disks of their own too.

    Raises CheckpointError where it belongs to a run that this one cannot continue.
    """
    root = checkpoints_of(bundle)
    chosen = newest(root, NEEDED) if rank.world.is_first else None
    step = torch.tensor([chosen.step if chosen else -1])
    if rank.world.is_first:
        set_aside(root, after=int(step))
    if rank.control is not None:
        dist.broadcast(step, 0, group=rank.control)
    if int(step) < 0:
        return None
    hand_out(root / step_folder(int(step)), rank)
    found = chosen or read_checkpoint(root / step_folder(int(step)))
    require_same_run(found, bundle, sets)
    return found


def require_same_run(found: Checkpoint, bundle: Bundle, sets: Sets) -> None:
    """Refuse to go on where the rest of the run would be computed from something else than its beginning."""
    config, told = bundle.config, found.manifest
    if told["data_digest"] != sets.train.digest:
        raise CheckpointError(
            f"{found.folder} was trained on other shards than {sets.train.location} (digest "
            f"{told['data_digest'][:12]}, now {sets.train.digest[:12]}). Way out: put the shards back, "
            "or start another run with name=..."
        )
    differing = _differences(told, bundle, total_steps(config, sets.plan(config).steps_per_epoch), sets.num_classes)
    if differing:
        raise CheckpointError(
            f"{found.folder} is not of this run: {'; '.join(differing)}. Way out: move that folder away, or start a "
            f"run of its own from these weights with init_from={found.folder} name=..."
        )


def _differences(told: dict[str, Any], bundle: Bundle, steps: int, num_classes: int) -> list[str]:
    model = {**to_dict(bundle.config.model), "num_classes": num_classes}
    keys = sorted({*model, *told["model"]})
    found = [
        f"model.{key} = {model.get(key)}, there {told['model'].get(key)}"
        for key in keys
        if model.get(key) != told["model"].get(key)
    ]
    planned = told.get("total_steps", steps)
    if planned != steps:
        found.append(f"it ends after {steps} steps, there {planned}")
    if told["run_id"] != bundle.run_id and not found:
        found.append(f"its id is {bundle.run_id}, there {told['run_id']}")
    return found
