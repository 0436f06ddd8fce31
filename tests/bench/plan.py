"""``python -m tests.bench.plan``: what the plan costs at the largest scale, and how well orders are shuffled."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tracemalloc
import warnings
from collections.abc import Callable
from time import perf_counter

import numpy as np

from orchestrator.data.order import TrainPlan, cut, keyed_rng

RANKS, WORKERS = 4096, 8

SHARDS, SHARD_SIZE, BATCH, WINDOW = 1281, 1000, 1024, 16
"""ImageNet as it is usually packed; `window` as in conf/data/defaults.yaml."""

BUFFERS = (1000, 10_000)
DEFAULT_BLOCK = 1 << 18


def scale(lanes: int) -> dict[str, float]:
    """100,000 shards of about 10,000 samples, 4,096 ranks x 8 loader processes: seconds, and MB at the peak."""
    sizes = tuple(keyed_rng("sizes").integers(8000, 12_001, 100_000).tolist())
    began = perf_counter()
    plan = TrainPlan(sizes, 0, 32_768, WINDOW, lanes)
    made = perf_counter() - began
    steps = plan.steps_per_epoch

    def epoch(number: int, stride: int = 1) -> range:
        return range(number * steps, (number + 1) * steps, stride)

    def seek(number: int, world: int, rank: int) -> Callable[[], object]:
        step = number * steps + number * 7919 % steps
        return lambda: plan.rank_draws(range(step, step + 1), world, rank)

    def fresh() -> TrainPlan:
        return TrainPlan(sizes, 0, 32_768, WINDOW, lanes)

    return {
        "samples": plan.num_samples,
        "lanes": plan.lane_count,
        "make_ms": round(1000 * made, 2),
        "epoch_of_a_rank_ms": ms([lambda n=n: plan.rank_draws(epoch(n), RANKS, 17) for n in range(10)]),
        "epoch_of_a_worker_ms": ms([lambda n=n: plan.rank_draws(epoch(n, WORKERS), RANKS, 17) for n in range(10)]),
        "seek_of_a_rank_ms": ms([seek(n, RANKS, 17) for n in range(20)]),
        "seek_of_a_lone_rank_ms": ms([seek(n, 1, 0) for n in range(20)]),
        "next_step_of_a_rank_ms": ms([seek(3, RANKS, 17)] * 20),
        "epoch_of_a_rank_peak_mb": peak_mb(
            lambda: TrainPlan(sizes, 0, 32_768, WINDOW, lanes).rank_draws(epoch(1), RANKS, 9)
        ),
        "step_of_a_lone_rank_peak_mb": peak_mb(lambda: fresh().draws(steps + 1)),
        "shards_read_by_a_rank": len(np.unique(plan.shards_of(plan.rank_draws(epoch(0), RANKS, 17).ids))),
    }


def ms(calls: list[Callable[[], object]]) -> float:
    """Median milliseconds."""
    seconds = []
    for call in calls:
        began = perf_counter()
        call()
        seconds.append(perf_counter() - began)
    return round(1000 * statistics.median(seconds), 2)


def peak_mb(call: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        call()
        return round(tracemalloc.get_traced_memory()[1] / 1e6, 1)
    finally:
        tracemalloc.stop()


def quality() -> dict[str, dict[str, float]]:
    """How far the samples of an ImageNet-like set are torn from their neighbours in the shard, by each order."""
    sizes = (SHARD_SIZE,) * SHARDS
    orders = {"perfect": np.random.default_rng(0).permutation(SHARDS * SHARD_SIZE)}
    orders |= {f"ours, lanes={lanes}": ours(sizes, lanes) for lanes in (0, 1, 8, 64)}
    orders |= {f"webdataset, shuffle({buffer}), 32 readers": webdataset_order(buffer, 32) for buffer in BUFFERS}
    for nodes, block in itertools.product((1, 8, 16, 64), (0, WINDOW * SHARD_SIZE, DEFAULT_BLOCK)):
        name = f"py1e, block {block}" if block else "py1s"
        orders[f"streaming, {name}, {nodes} canonical nodes"] = streaming_order(nodes, block)
    return {name: torn(order) for name, order in orders.items()}


def torn(order: np.ndarray) -> dict[str, float]:
    """Measures of an order of sample numbers, where B samples each make a step.

    together: share of neighbours in a shard that share a step, x N / B (a perfect shuffle: 1).
    median_apart: median distance of neighbours in the order / N (a perfect shuffle: 0.293).
    shards_per_step: shards that meet in a step (a perfect shuffle of this set: 705).
    """
    place = np.full(SHARDS * SHARD_SIZE, -1)
    place[order] = np.arange(len(order))
    left, right = place[:-1], place[1:]
    kept = (left >= 0) & (right >= 0) & (np.arange(len(left)) % SHARD_SIZE != SHARD_SIZE - 1)
    apart, same_step = np.abs(left - right)[kept], (left // BATCH == right // BATCH)[kept]
    steps = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH) // SHARD_SIZE
    return {
        "together": round(float(same_step.mean()) * len(order) / BATCH, 2),
        "median_apart": round(float(np.median(apart)) / len(order), 4),
        "shards_per_step": round(float(np.mean([len(np.unique(step)) for step in steps]))),
    }


def ours(sizes: tuple[int, ...], lanes: int) -> np.ndarray:
    plan = TrainPlan(sizes, 0, BATCH, WINDOW, lanes)
    return plan.rank_draws(range(plan.steps_per_epoch), 1, 0).ids


def webdataset_order(buffer: int, readers: int) -> np.ndarray:
    """Shards are shuffled and dealt to readers (ranks x workers), each with webdataset's own buffer of samples."""
    from webdataset.filters import shuffle

    shards = np.random.default_rng(0).permutation(SHARDS)
    queues = []
    for reader in range(readers):
        samples = (shards[reader::readers, None] * SHARD_SIZE + np.arange(SHARD_SIZE)).ravel().tolist()
        queues.append(np.array(list(shuffle(buffer, rng=random.Random(reader))(iter(samples)))))
    return interleaved(queues)


def streaming_order(nodes: int, block: int) -> np.ndarray:
    """Mosaic Streaming's py1e as published, from its description: a shard's samples spread over a range around it.

    Each node has its part of the shuffled shards; block = 0 is py1s, which shuffles within each shard only.
    """
    rng = np.random.default_rng(0)
    line = (rng.permutation(SHARDS)[:, None] * SHARD_SIZE + np.arange(SHARD_SIZE)).ravel()
    return interleaved([spread(line[cut(len(line), nodes, node)], block, rng) for node in range(nodes)])


def spread(ids: np.ndarray, block: int, rng: np.random.Generator) -> np.ndarray:
    places = np.arange(len(ids), dtype=float)
    borders = [0, *(np.flatnonzero(np.diff(ids // SHARD_SIZE)) + 1), len(ids)]
    for start, stop in itertools.pairwise(borders):
        reach = max(0.0, (block * rng.uniform(0.75, 1.25) - (stop - start)) / 2)
        shifts = rng.uniform(max(-reach, -start), min(reach, len(ids) - stop), stop - start)
        places[start:stop] = rng.permutation(places[start:stop]) + shifts
    return ids[np.argsort(places)]


def interleaved(queues: list[np.ndarray]) -> np.ndarray:
    """Steps that take the same number from each queue, as long as all of them last."""
    share = BATCH // len(queues)
    steps = min(map(len, queues)) // share
    return np.concatenate([queue[: steps * share].reshape(steps, share) for queue in queues], axis=1).ravel()


def measure() -> dict[str, object]:
    """All figures of the plan."""
    return {"scale, lanes=0": scale(0), "scale, lanes=4096": scale(4096), "quality": quality()}


def main() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(json.dumps(measure(), indent=2))


if __name__ == "__main__":
    main()
