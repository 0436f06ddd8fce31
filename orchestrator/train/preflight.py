"""What can be known to be wrong before a process starts: the data against the config."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.config import RunConfig, process_range
from orchestrator.data.fetch import local_path
from orchestrator.data.index import Shard, ShardIndex, load_index
from orchestrator.data.members import list_first
from orchestrator.data.order import TrainPlan
from orchestrator.data.remote import is_url
from orchestrator.errors import ConfigError, DataError
from orchestrator.model.zoo import build_model
from orchestrator.secrets import use_for_stores
from orchestrator.train.process import require_device
from orchestrator.train.virtual import require_shareable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sets:
    """The shard sets of a run and the size of its head."""

    train: ShardIndex
    val: ShardIndex
    num_classes: int

    def facts(self) -> dict[str, Any]:
        """Identity and size of each split, for the record."""
        return {split: set_facts(getattr(self, split)) for split in ("train", "val")}

    def plan(self, config: RunConfig) -> TrainPlan:
        sizes = tuple(shard.nsamples for shard in self.train.shards)
        batch, data = config.recipe.global_batch_size, config.data
        return TrainPlan(sizes, config.seed, batch, data.shuffle_shards, data.lanes, data.repeats)


def set_facts(index: ShardIndex) -> dict[str, Any]:
    return {
        "location": index.location,
        "digest": index.digest,
        "num_samples": index.num_samples,
        "num_classes": index.num_classes,
    }


def open_sets(config: RunConfig) -> Sets:
    """Load both indices, with the keys of `cluster.store_secret`.

    Raises DataError or ConfigError where they do not fit the config or each other.
    """
    use_for_stores(config.cluster.store_secret)
    train, val = load_index(config.data.train), load_index(config.data.val)
    if train.classes != val.classes:
        raise DataError(
            f"data.val = {config.data.val}: its {val.num_classes} classes are not the {train.num_classes} of "
            f"data.train ({_first_difference(train.classes, val.classes)}). "
            "Way out: pack both splits with one `orchestrator shards make`"
        )
    return Sets(train, val, head_size(config, train))


def check_run(config: RunConfig, processes: int, on_this_machine: int | None = None) -> Sets:
    """All that can be known to be wrong before the run's folder exists: data, sizes, device, model.

    `processes`: the world size; `on_this_machine`: where that is less.
    """
    sets = open_sets(config)
    _require_fits(config, sets, processes)
    _require_local_shards([*sets.train.shards, *sets.val.shards])
    require_device(config.compute, on_this_machine or processes)
    _require_model(config, sets.num_classes)
    return sets


def check_for_elsewhere(config: RunConfig, sets: Sets, processes: int) -> None:
    """What this machine can know of a run that another one will execute: sizes and model."""
    _require_fits(config, sets, processes)
    _require_model(config, sets.num_classes)


def _require_fits(config: RunConfig, sets: Sets, processes: int) -> None:
    slices = require_shareable(config.compute.virtual_ranks, process_range(config.compute.num_processes), processes)
    sets.plan(config).require_fits(slices, config.recipe.accumulate)


def _require_model(config: RunConfig, num_classes: int) -> None:
    try:
        with torch.device("meta"):  # without storage, so that it costs no time
            build_model(config.model, num_classes)
    except ConfigError:
        raise
    except Exception as error:
        log.debug("%s cannot be built without storage, which is left to the ranks: %s", config.model.name, error)


def _require_local_shards(shards: Sequence[Shard]) -> None:
    faults = [fault for shard in shards if not is_url(shard.location) and (fault := _fault(shard))]
    if faults:
        raise DataError(f"{len(faults)} of {len(shards)} shards are not as their index says:\n{list_first(faults)}")


def _fault(shard: Shard) -> str | None:
    try:
        local_path(shard)
    except DataError as error:
        return str(error)
    return None


def head_size(config: RunConfig, index: ShardIndex) -> int:
    """Size of the head: as configured, else as many as the shards have classes."""
    wanted = config.model.num_classes
    if wanted is not None and wanted < index.num_classes:
        rule = f"is smaller than the {index.num_classes} classes in {index.location}"
        way_out = f"model.num_classes={index.num_classes}, or leave it out"
        raise ConfigError("model.num_classes", wanted, rule, way_out)
    return wanted or index.num_classes


def class_names(index: ShardIndex, num_classes: int) -> list[str]:
    """A name for each output of the head; outputs that no class uses are named by their number."""
    return [*index.classes, *(str(number) for number in range(index.num_classes, num_classes))]


def total_steps(config: RunConfig, steps_per_epoch: int) -> int:
    planned = config.recipe.epochs * steps_per_epoch
    return min(planned, config.max_steps) if config.max_steps else planned


def _first_difference(train: tuple[str, ...], val: tuple[str, ...]) -> str:
    for number, (a, b) in enumerate(zip(train, val, strict=False)):
        if a != b:
            return f"class {number} is {a!r} and {b!r}"
    return f"after class {min(len(train), len(val)) - 1}"
