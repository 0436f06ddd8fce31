"""This project's loader, as `fit` builds it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.loaders import BATCH, SIDE

STEPS = 10_000


def config_of(shards: str, workers: int, decode: str) -> Any:
    """The config of a run on `shards`, composed as the command line does it."""
    from orchestrator.compose import compose

    keys = {
        "data": "imagefolder", "data.train": shards, "data.decode": decode, "data.num_workers": workers,
        "data.image_size": SIDE, "recipe.global_batch_size": BATCH,
    }  # fmt: skip
    return compose([f"{key}={value}" for key, value in keys.items()]).config


def loader_of(shards: str, config: Any, steps: range) -> Any:
    """A loader for some steps of a run on `shards`."""
    from orchestrator.data.index import load_index
    from orchestrator.data.order import TrainPlan
    from orchestrator.data.stream import Split, train_loader

    index = load_index(shards)
    plan = TrainPlan(tuple(s.nsamples for s in index.shards), config.seed, BATCH, config.data.shuffle_shards)
    split = Split(index, config.data, config.seed, index.num_classes, 0, 1)
    return train_loader(plan, split, 1, steps)


def batches(data: Path, workers: int, decode: str) -> Iterator[Any]:
    """The epoch's steps differ by one image at most; those of the benchmark's sets are cut to whole batches."""
    shards = str(data / "train")
    for batch in loader_of(shards, config_of(shards, workers, decode), range(STEPS)):
        yield batch.images
