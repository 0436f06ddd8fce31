"""Which sample comes at which step: pure functions of the config, without I/O, blind to loader processes.

Every sample of an epoch stands in exactly one step. The steps of an epoch differ by at most one sample, so none is
tiny and none is dropped; a step is cut into contiguous slices, one a rank, which again differ by at most one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate

import numpy as np

from orchestrator.errors import ConfigError


def keyed_rng(*key: int | str) -> np.random.Generator:
    """A counter-based generator for a purpose: equal keys give equal numbers in every process."""
    digest = blake2b("\0".join(f"{type(part).__name__}:{part}" for part in key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def cut(count: int, parts: int, part: int) -> slice:
    """The `part`-th of `parts` contiguous slices of `count` things, sizes differing by at most one."""
    return slice(part * count // parts, (part + 1) * count // parts)


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """The order of training samples; sample numbers count through the shards of the index."""

    shard_sizes: tuple[int, ...]
    seed: int
    global_batch_size: int
    window: int
    """Shards across which samples are shuffled together; 0 = all."""
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_samples(self) -> int:
        return sum(self.shard_sizes)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def batch(self, step: int) -> np.ndarray:
        """Sample numbers of a step, counted from the start of the run: (n,) int64."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[cut(self.num_samples, self.steps_per_epoch, within)]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = epoch_order(self.shard_sizes, self.seed, epoch, self.window)
        return self._orders[epoch]

    def require_fits(self, world_size: int, accumulate: int) -> None:
        """Refuse a world in which some rank has no sample in some part of some step."""
        smallest, needed = self.num_samples // self.steps_per_epoch, world_size * accumulate
        if smallest < needed:
            rule = (
                f"leaves steps of {smallest} images ({self.num_samples} samples in {self.steps_per_epoch} steps) "
                f"for {world_size} processes x {accumulate} parts"
            )
            way_out = "fewer processes or parts"
            if self.num_samples >= needed:
                batch = -(-self.num_samples // (self.num_samples // needed))
                way_out += f", or recipe.global_batch_size={batch}"
            raise ConfigError("recipe.global_batch_size", self.global_batch_size, rule, way_out)


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """All sample numbers of an epoch, (N,) int64: shards permuted, then samples shuffled within windows of shards."""
    starts = [0, *accumulate(shard_sizes)]
    rng = keyed_rng(seed, epoch, "order")
    shards = rng.permutation(len(shard_sizes))
    order = []
    for first in range(0, len(shards), window or len(shards)):
        block = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + (window or len(shards))]]
        order.append(rng.permutation(np.concatenate(block)))
    return np.concatenate(order).astype(np.int64)


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """Every sample exactly once, in the order of the shards; all ranks take equally many steps of equal size."""

    num_samples: int
    per_rank_batch_size: int
    world_size: int

    @property
    def steps(self) -> int:
        return -(-self.num_samples // (self.per_rank_batch_size * self.world_size))

    def batch(self, step: int, rank: int) -> np.ndarray:
        """Sample numbers of a rank at a step, (n,) int64 with n <= per_rank_batch_size, perhaps none."""
        first = (step * self.world_size + rank) * self.per_rank_batch_size
        return np.arange(min(first, self.num_samples), min(first + self.per_rank_batch_size, self.num_samples))
