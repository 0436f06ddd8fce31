"""The first weights of a run that starts from another run's checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from orchestrator.bundle import Initial
from orchestrator.config import RunConfig
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.model.weights import load_weights
from orchestrator.train.checkpoint import EMA, MODEL, Checkpoint, open_checkpoint
from orchestrator.train.loading import find_checkpoint
from orchestrator.train.state import hash_tensors


def find_initial(config: RunConfig) -> Initial | None:
    """What `init_from` means now: its weights get into the run's id, so that the id tells what it started from.

    Raises ConfigError or CheckpointError where there is no such checkpoint or it is not whole.
    """
    if config.init_from is None:
        return None
    folder = find_checkpoint(config.init_from, Path(config.runs_dir), "init_from")
    if not folder.is_dir():
        rule = "is a file, and a run starts from a checkpoint's folder"
        raise ConfigError("init_from", config.init_from, rule, f"model.weights={folder} takes weights of a file")
    found = open_checkpoint(folder)
    return Initial(str(folder), hash_tensors(found.load_weights()))


def start_from(initial: Initial, net: nn.Module) -> str:
    """Load the weights that the run was frozen with; returns a sentence about what was taken.

    A head of another size stays as it is. Raises CheckpointError where the weights changed or are another model's.
    """
    found = open_checkpoint(Path(initial.path))
    _require_unchanged(found, initial)
    note = load_weights(found.folder / (EMA if EMA in found.manifest["files"] else MODEL), net, replace_head=True)
    return f"init_from: {note}"


def _require_unchanged(found: Checkpoint, initial: Initial) -> None:
    now = hash_tensors(found.load_weights())
    if now != initial.weights_sha256:
        raise CheckpointError(
            f"{found.folder} holds other weights than when this run was frozen (sha256 {initial.weights_sha256[:12]}, "
            f"now {now[:12]}). Way out: give the command again, which starts a run of its own from them"
        )
