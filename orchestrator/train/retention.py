"""Which checkpoints of a run stay: the newest, and the best by one figure of the evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.config import CheckpointingConfig
from orchestrator.errors import CheckpointError
from orchestrator.train.checkpoint import Checkpoint, open_checkpoint, read_checkpoint
from orchestrator.train.fence import Fence

DEFAULT_METRIC = "val/acc1"


def score(metrics: Mapping[str, Any], metric: str) -> float | None:
    """The greater, the better; None where the figure is unknown."""
    value = metrics.get(metric)
    value = value.get("value") if isinstance(value, Mapping) else value
    if not isinstance(value, (int, float)) or math.isnan(value):
        return None
    return -value if "loss" in metric else value


def ranking(manifests: Mapping[str, Mapping[str, Any]], metric: str | None = None) -> list[str]:
    """Names of scored checkpoints, best first, the newest of equals first.

    `metric`: by default what the newest manifest says that its run goes by.
    """
    newest = manifests[max(manifests)] if manifests else {}
    by = metric or str(newest.get("best_by", DEFAULT_METRIC))
    scores = {name: score(manifest.get("metrics", {}), by) for name, manifest in manifests.items()}
    scored = [(value, name) for name, value in scores.items() if value is not None]
    return [name for _, name in sorted(scored, reverse=True)]


def kept(names: set[str], manifests: Mapping[str, Mapping[str, Any]], settings: CheckpointingConfig) -> set[str]:
    """Which of a run's checkpoints stay."""
    return set(sorted(names)[-settings.keep_last :]) | set(ranking(manifests, settings.metric)[: settings.keep_best])


def read_manifests(root: Path) -> dict[str, dict[str, Any]]:
    """The manifests of a run's checkpoints that can be read, by folder name."""
    found = {}
    for folder in root.glob("step_*"):
        with suppress(CheckpointError):
            found[folder.name] = read_checkpoint(folder).manifest
    return found


def best(root: Path, metric: str | None = None) -> Checkpoint | None:
    """The whole checkpoint with the best figure, the newest of equals."""
    folder = best_folder(root, metric)
    return open_checkpoint(folder) if folder else None


def best_folder(root: Path, metric: str | None = None) -> Path | None:
    """Where `best` lies, without verifying it."""
    ranked = ranking(read_manifests(root), metric)
    return root / ranked[0] if ranked else None


def prune(fence: Fence, settings: CheckpointingConfig, held: AbstractSet[str] = frozenset()) -> None:
    """Remove all that need not stay; `held`: folders that somebody is reading now."""
    names = {folder.name for folder in fence.root.glob("step_*")}
    for name in sorted(names - kept(names, read_manifests(fence.root), settings) - held):
        fence.remove(fence.root / name)
