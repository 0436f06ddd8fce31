"""Which sample comes at which step: pure functions of the config, without I/O, blind to ranks and loader processes.

An epoch has ceil(N / global_batch_size) steps whose sizes differ by at most one: none is tiny, no sample is dropped or
drawn in excess. The shards are permuted for each epoch, laid end to end and cut into lanes. A step takes from each
lane in turn the same number of samples, up to one. So a rank, whose slice of a step is contiguous, reads whole lanes
where the world size divides their number, and at most one lane more than its share elsewhere. Within a lane samples
are shuffled in blocks that span about `window` shards.

Each place of this order is computed on its own: nothing here is as long as the set, a seek costs what a step costs,
and a rank computes its own slice only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from orchestrator.data.bijection import shuffled
from orchestrator.errors import ConfigError
from orchestrator.keyed import keyed_rng

DRAWS_AT_ONCE = 1 << 16
"""Of a long range of steps; it bounds the memory of what stands between."""


def cut(count: int, parts: int, part: int) -> slice:
    """The `part`-th of `parts` contiguous slices of `count` things, sizes differing by at most one."""
    return slice(part * count // parts, (part + 1) * count // parts)


def automatic_lanes(shards: int, global_batch_size: int, window: int, repeats: int) -> int:
    """The lanes that `data.lanes=0` stands for: a power of two that serves any world, whatever it turns out to be.

    The order must not depend on the number of ranks, so one number has to do for all. Many lanes spare a large cluster
    downloads: a rank reads 1/lanes of the set. Few lanes spare a lone machine disk and start-up: it needs the shards of
    lanes x window at once. Between the two stands 2 x sqrt(shards / window), which lets the lanes and the blocks of a
    lane grow alike with the set: at window=16, 1,281 shards make 16 lanes and 100,000 make 128.

    No more than shards / window, so that each lane spans a window; a set of fewer than two windows is one lane, and one
    of up to a window and a half is shuffled as a whole. No more than batch / (4 x repeats), so that the lanes' shares
    of a step differ little and most copies of a sample meet in one step. Powers of two, because worlds are: where one
    divides the other, no rank's slice crosses into a foreign lane.
    """
    windows = shards / window if window else 1
    most = int(min(windows, 2 * windows**0.5, global_batch_size / (4 * repeats)))
    return 1 << max(0, most.bit_length() - 1)


class Draws(NamedTuple):
    """Samples in the order in which they are drawn."""

    ids: np.ndarray  # (n,) int64 sample numbers
    copies: np.ndarray  # (n,) int64 in 0..repeats-1: tells a sample's draws of a round apart


class _Lanes(NamedTuple):
    """What all rounds share: how N places fall to lanes, and steps of two sizes, N // steps and one more, to lanes."""

    edges: np.ndarray  # (2, lanes + 1) int64 first slot of each lane in a step of the smaller and of the larger size
    starts: np.ndarray  # (lanes + 1,) int64 first place of each lane
    shards: np.ndarray  # (shards,) int64 first sample number of each shard
    sizes: np.ndarray  # (shards,) int64


class _Round(NamedTuple):
    """What a round of epochs draws at random."""

    ends: np.ndarray  # (shards,) int64 place after the last one of each shard, in the order of the round
    shift: np.ndarray  # (shards,) int64 sample number minus place, within each shard
    keys: np.ndarray  # (lanes, blocks) uint64


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """The order of training samples; sample numbers count through the shards of the index.

    An epoch makes N draws. With `repeats` = 1 each sample is drawn once in it. Otherwise `repeats` epochs make a round
    in which each sample is drawn `repeats` times, one after the other in its lane, hence in one epoch and mostly in one
    step; at the border of two epochs of a round at most one sample of each lane has copies on either side.
    Raises ConfigError where lanes are asked for that the set or the batch cannot fill.
    """

    shard_sizes: tuple[int, ...]
    seed: int
    global_batch_size: int
    window: int
    """Shards across which the samples of a lane are shuffled together; 0 = all."""
    lanes: int = 0
    """Parts of the order that every step draws from evenly; 0 = `automatic_lanes`."""
    repeats: int = 1
    num_samples: int = field(init=False)
    lane_count: int = field(init=False)
    """`lanes`, or what is chosen for 0."""
    blocks: int = field(init=False)
    """Parts of each lane that are shuffled within themselves."""
    _lanes: _Lanes = field(init=False, repr=False, compare=False)
    _rounds: dict[int, _Round] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = np.asarray(self.shard_sizes, np.int64)
        samples, shards = int(sizes.sum()), int(np.count_nonzero(sizes))
        assert samples, "an index without samples is refused where it is loaded"
        _set(self, num_samples=samples)
        lanes = self.lanes or automatic_lanes(shards, self.global_batch_size, self.window, self.repeats)
        _require_lanes(lanes, shards, samples // self.steps_per_epoch, self.steps_per_epoch)
        blocks = max(1, round(shards / (lanes * self.window))) if self.window else 1
        _set(self, lane_count=lanes, blocks=blocks, _lanes=_lay_out(sizes, samples, self.steps_per_epoch, lanes))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def step_size(self, step: int) -> int:
        """Samples of a step over all ranks."""
        share = cut(self.num_samples, self.steps_per_epoch, step % self.steps_per_epoch)
        return share.stop - share.start

    def batch(self, step: int) -> np.ndarray:
        """Sample numbers of a step, counted from the start of the run: (n,) int64."""
        return self.draws(step).ids

    def draws(self, step: int) -> Draws:
        """The global batch of a step, counted from the start of the run."""
        return self.rank_draws(range(step, step + 1), 1, 0)

    def rank_draws(self, steps: range, world_size: int, rank: int) -> Draws:
        """A rank's slices `cut(step_size, world_size, rank)` of some steps, joined; costs what these samples cost.

        Any step of `range` goes, so a loader process takes every W-th: `range(start, stop, W)`.
        """
        at_once = max(1, DRAWS_AT_ONCE * world_size // self.global_batch_size)
        found = [Draws(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for epoch in range(steps[0] // self.steps_per_epoch, steps[-1] // self.steps_per_epoch + 1) if steps else ():
            within = _within(steps, epoch, self.steps_per_epoch)
            pieces = (within[first : first + at_once] for first in range(0, len(within), at_once))
            found += [self._of_epoch(epoch, piece, world_size, rank) for piece in pieces]
        return Draws(*map(np.concatenate, zip(*found, strict=True)))

    def shards_of(self, ids: np.ndarray) -> np.ndarray:
        """The shard of each sample, (n,) int64, as numbered in `shard_sizes`."""
        return np.searchsorted(self._lanes.shards, ids, side="right") - 1

    def shards_at_once(self, world_size: int) -> int:
        """About the most shards that a rank reads from at a time: what a cache or a set of open files should hold."""
        shards = len(self._lanes.sizes)
        crosses = self.lane_count % world_size > 0 and world_size % self.lane_count > 0
        lanes = min(self.lane_count, -(-self.lane_count // world_size) + crosses)
        block = int(np.diff(self._lanes.starts).max()) // self.blocks
        return min(shards, lanes * (-(-block * shards // self.num_samples) + 1))

    def require_fits(self, slices: int, accumulate: int) -> None:
        """Refuse so many slices of a step, processes or virtual ranks, that some part of one has no sample."""
        smallest, needed = self.num_samples // self.steps_per_epoch, slices * accumulate
        if smallest < needed:
            rule = (
                f"leaves steps of {smallest} images ({self.num_samples} samples in {self.steps_per_epoch} steps) "
                f"for {slices} processes (or compute.virtual_ranks) x {accumulate} parts"
            )
            way_out = "fewer processes or parts"
            if self.num_samples >= needed:
                batch = -(-self.num_samples // (self.num_samples // needed))
                way_out += f", or recipe.global_batch_size={batch}"
            raise ConfigError("recipe.global_batch_size", self.global_batch_size, rule, way_out)

    def _of_epoch(self, epoch: int, steps: np.ndarray, world_size: int, rank: int) -> Draws:
        """A rank's draws of the steps (m,) of an epoch, counted from its start."""
        number, part = divmod(epoch, self.repeats)
        lane, index = self._seats(steps, world_size, rank)
        starts = self._lanes.starts
        length = starts[lane + 1] - starts[lane]
        within, copies = np.divmod(part * length + index, self.repeats)
        drawn = self._drawn(number)
        block = ((within + 1) * self.blocks - 1) // length
        first = block * length // self.blocks
        size = (block + 1) * length // self.blocks - first
        places = starts[lane] + first + shuffled(within - first, size, drawn.keys[lane, block])
        return Draws(places + drawn.shift[np.searchsorted(drawn.ends, places, side="right")], copies)

    def _seats(self, steps: np.ndarray, world_size: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """The lane of each draw of a rank, and the draws that lane has made before it in the epoch: (n,) int64 each."""
        edges, (small, large) = self._lanes.edges, self._lanes.edges[:, -1]
        larger_before = steps * self.num_samples // self.steps_per_epoch - steps * small
        is_large = (steps + 1) * self.num_samples // self.steps_per_epoch - (steps + 1) * small - larger_before
        size = np.where(is_large, large, small)
        low = rank * size // world_size
        counts = (rank + 1) * size // world_size - low
        step = np.repeat(np.arange(len(steps)), counts)
        slot = np.arange(len(step)) + (low - np.cumsum(counts) + counts)[step]
        lane = ((slot + 1) * self.lane_count - 1) // size[step]
        of_small, of_large = edges[:, lane + 1] - edges[:, lane]
        before = (steps - larger_before)[step] * of_small + larger_before[step] * of_large
        return lane, before + slot - edges[is_large[step], lane]

    def _drawn(self, number: int) -> _Round:
        """The permutation of the shards and the keys of the blocks; those of one round are kept."""
        drawn = self._rounds.get(number)
        if drawn is None:
            order = _permutation(keyed_rng(self.seed, number, "shards"), len(self._lanes.sizes))
            ends = np.cumsum(self._lanes.sizes[order])
            shift = self._lanes.shards[order] - (ends - self._lanes.sizes[order])
            blocks = keyed_rng(self.seed, number, "blocks").bit_generator
            keys = blocks.random_raw(self.lane_count * self.blocks).reshape(self.lane_count, self.blocks)
            drawn = _Round(ends, shift, keys)
            self._rounds.clear()
            self._rounds[number] = drawn
        return drawn


def _permutation(rng: np.random.Generator, count: int) -> np.ndarray:
    """Like `rng.permutation(count)`, but from raw bits: those alone numpy promises to keep from version to version.

    Sorts by 32-bit tickets in two stable passes of 16 bits, which numpy does by radix: a third of the time of a sort.
    """
    tickets = rng.bit_generator.random_raw(count)
    order = np.argsort(tickets.astype(np.uint16), kind="stable")
    return order[np.argsort((tickets >> np.uint64(16)).astype(np.uint16)[order], kind="stable")]


def _set(plan: TrainPlan, **facts: object) -> None:
    for name, value in facts.items():
        object.__setattr__(plan, name, value)  # derived once, before anyone sees the frozen plan


def _within(steps: range, epoch: int, steps_per_epoch: int) -> np.ndarray:
    """Those of `steps` that lie in an epoch, counted from its start."""
    first = epoch * steps_per_epoch
    skipped = max(0, -(-(first - steps.start) // steps.step))
    kept = steps[skipped:]
    return np.arange(kept.start, min(kept.stop, first + steps_per_epoch), kept.step, dtype=np.int64) - first


def _require_lanes(lanes: int, shards: int, smallest_step: int, steps: int) -> None:
    most = min(shards, smallest_step)
    if lanes > most:
        rule = (
            f"exceeds the number of shards, {shards}, so that lanes would be parts of a shard, the same in each epoch"
            if shards < lanes
            else f"exceeds the {smallest_step} images of a step ({steps} steps per epoch), which draws from each lane"
        )
        raise ConfigError("data.lanes", lanes, rule, f"at most data.lanes={most}, or data.lanes=0 to have it chosen")


def _lay_out(sizes: np.ndarray, samples: int, steps: int, lanes: int) -> _Lanes:
    """A lane is as long as its slices of all steps together, which is what lets every step end at its edges."""
    small = samples // steps
    edges = np.arange(lanes + 1) * np.array([[small], [small + 1]]) // lanes
    large_steps = samples - small * steps
    starts = (steps - large_steps) * edges[0] + large_steps * edges[1]
    return _Lanes(edges, starts, np.cumsum(sizes) - sizes, sizes)


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
