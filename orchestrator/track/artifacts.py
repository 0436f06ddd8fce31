"""What a run hands to W&B besides numbers: checkpoints, the shards it read, the confusion matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.redact import without_secrets

if TYPE_CHECKING:
    from wandb import Run

MAX_CELLS = 10_000
"""Rows that a W&B table shows."""


def add_checkpoint(run: Run, name: str, folder: Path, aliases: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """A checkpoint folder as an artifact of type `model`, uploaded from where it lies."""
    import wandb

    artifact = wandb.Artifact(name, type="model", metadata=dict(metadata))
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        artifact.add_file(str(file), name=file.name, policy="immutable", skip_cache=True)
    run.log_artifact(artifact, aliases=list(aliases))


def add_shard_index(run: Run, data: Mapping[str, Mapping[str, Any]]) -> None:
    """Record each shard set as an input of the run: its digest, size and place, not its images.

    Offline there is no server to resolve an input, so the description is logged as an artifact of the run.
    """
    import wandb

    for split, facts in data.items():
        facts = without_secrets(dict(facts))
        artifact = wandb.Artifact(f"shards-{split}-{str(facts.get('digest', 'unknown'))[:12]}", type="dataset",
                                  metadata=facts)  # fmt: skip
        with artifact.new_file("shards.json") as file:
            json.dump(facts, file, indent=2, sort_keys=True)
        if run.offline:
            run.log_artifact(artifact)
        else:
            run.use_artifact(artifact)


def add_confusion(run: Run, matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> None:
    """A confusion matrix as W&B's own chart, drawn from counts, so that no row per sample is sent."""
    import wandb

    cells: list[Any] = [
        [actual, predicted, int(count)]
        for actual, row in zip(class_names, matrix, strict=True)
        for predicted, count in zip(class_names, row, strict=True)
    ]
    table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=cells[:MAX_CELLS])
    fields = {"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"}
    chart = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "Confusion matrix"})
    run.log({"val/confusion": chart})
