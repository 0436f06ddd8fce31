"""What a run will take: memory of a process, steps, hours, bytes from afar, checkpoints, money. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.data.index import ShardIndex
from orchestrator.data.order import TrainPlan
from orchestrator.track.goodput import read_prices
from orchestrator.train.footprint import Footprint
from orchestrator.train.preflight import total_steps


@dataclass(frozen=True, slots=True)
class Needs:
    """None: not known, since the data or the speed are not."""

    footprint: Footprint
    processes: int
    num_nodes: int
    steps: int | None
    epochs: int
    hours: float | None
    checkpoint_bytes: int
    checkpoints: int | None
    set_bytes: int | None
    node_bytes_per_epoch: int | None
    """That a node without a full cache reads from afar: its share of the shards."""
    cached_share: float | None
    """Of the training set, that a node's cache can hold."""
    petaflops: float | None
    """Of the whole run, in 10^15 operations."""
    cost: dict[str, float]
    """By the name of the device."""

    def facts(self) -> dict[str, Any]:
        """Plain values, without the timeline."""
        foot = self.footprint
        memory = {name: getattr(foot, name) for name in ("weights", "buffers", "optimizer", "moving_average")}
        own = {name: getattr(self, name) for name in self.__slots__ if name != "footprint"}
        memory |= {"within_a_step": foot.within_a_step, "peak": foot.peak}
        return {
            "schema": 1, "rows": foot.rows, "memory_bytes": memory, "flops_per_image": foot.flops_per_image, **own,
        }  # fmt: skip


def rows_of(config: RunConfig, processes: int) -> int:
    """Images that a process computes at once: its largest part of a slice of a step."""
    virtual = config.compute.virtual_ranks
    slices = int(virtual) if virtual.isdecimal() else processes
    return ceil(ceil(config.recipe.global_batch_size / max(slices, processes)) / config.recipe.accumulate)


def needs_of(
    config: RunConfig,
    processes: int,
    footprint: Footprint,
    train: ShardIndex | None,
    plan: TrainPlan | None,
    images_per_s: float | None,
) -> Needs:
    """`train`, `plan`: None where the shards cannot be read from here. `images_per_s`: of the whole run."""
    steps = total_steps(config, plan.steps_per_epoch) if plan else None
    images = steps * config.recipe.global_batch_size if steps else None
    hours = images / images_per_s / 3600 if images and images_per_s else None
    set_bytes = sum(shard.filesize for shard in train.shards) if train else None
    prices = read_prices(config.cluster.prices)
    return Needs(
        footprint=footprint,
        processes=processes,
        num_nodes=config.compute.num_nodes,
        steps=steps,
        epochs=config.recipe.epochs,
        hours=hours,
        checkpoint_bytes=footprint.kept,
        checkpoints=_checkpoints(config, steps, plan.steps_per_epoch) if plan and steps else None,
        set_bytes=set_bytes,
        node_bytes_per_epoch=ceil(set_bytes / config.compute.num_nodes) if set_bytes else None,
        cached_share=min(1.0, config.data.cache_gib * 2**30 / set_bytes) if set_bytes else None,
        petaflops=images * footprint.flops_per_image / 1e15 if images else None,
        cost={name: hours * processes * price for name, price in prices.items()} if hours else {},
    )


def _checkpoints(config: RunConfig, steps: int, per_epoch: int) -> int:
    when = config.checkpointing
    by_epoch = ceil(steps / per_epoch) // when.every_epochs if when.every_epochs else 0
    by_step = steps // when.every_steps if when.every_steps else 0
    return max(1, by_epoch + by_step)
