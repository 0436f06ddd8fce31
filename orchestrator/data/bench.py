"""How fast shards come off their disk and out of the loader, and how many loader processes are worth it."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.data.fetch import local_path
from orchestrator.data.index import ShardIndex
from orchestrator.data.order import TrainPlan
from orchestrator.data.stream import Batch, Loader, Split, train_loader
from orchestrator.errors import ConfigError

CHUNK = 8 << 20
MOST_READ = 1 << 30
"""Bytes of shards that are read to time the disk."""
NEAR_BEST = 0.05
"""Within this share of the best speed further loader processes are not worth their memory."""
MEASURE_S = 3.0
MANY_STEPS = 1_000_000
MB = 10**6


@dataclass(frozen=True, slots=True)
class Reading:
    """MB/s of reading shards; cold: after the kernel was asked to forget them, None where it kept them."""

    bytes: int
    cold_mb_per_s: float | None
    warm_mb_per_s: float


@dataclass(frozen=True, slots=True)
class Speed:
    """What the loader delivers with so many processes."""

    workers: int
    images_per_s: float
    wait_fraction: float | None
    """Share of the time that a consumer of the given speed waits; None where no speed is given."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that `shards bench` tells."""

    location: str
    samples: int
    global_batch_size: int
    reading: Reading
    images_per_cpu_s: float
    speeds: tuple[Speed, ...]
    worth: int
    """Loader processes: the fewest whose speed is within 5 % of the best."""
    consume_images_per_s: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def wait_fraction(images_per_s: float, consume: float) -> float:
    """Share of its time that a consumer of `consume` images/s spends waiting for a loader of `images_per_s`."""
    return max(0.0, 1 - images_per_s / consume)


def fewest_worth(speeds: Mapping[int, float]) -> int:
    """The smallest number of processes whose speed is within NEAR_BEST of the best; {processes: images/s}."""
    enough = (1 - NEAR_BEST) * max(speeds.values())
    return min(workers for workers, speed in speeds.items() if speed >= enough)


def default_workers(cores: int) -> list[int]:
    """0, then doubling from 1 up to the cores, these themselves included."""
    doubling = [1 << power for power in range(cores.bit_length()) if 1 << power < cores]
    return [0, *doubling, cores]


def parse_workers(text: str) -> list[int]:
    """`0,1,2` as numbers, each once, rising."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) <= 256 for part in parts):
        rule = "must be numbers from 0 to 256 with commas between them"
        raise ConfigError("--workers", text, rule, "e.g. --workers 0,1,2,4")
    return sorted({int(part) for part in parts})


def require_consume(consume: float | None) -> None:
    if consume is not None and not 0 < consume < float("inf"):
        raise ConfigError("--consume", consume, "must be a number of images/s above 0", "e.g. --consume 2500")


def bench_shards(
    index: ShardIndex,
    config: RunConfig,
    workers: Sequence[int],
    consume: float | None,
    advance: Callable[[int], None],
    seconds: float = MEASURE_S,
) -> Report:
    """Time reading, decoding and loading; `advance` is called once for each of 2 + len(workers) parts."""
    reading = time_reading(index, config.data.cache_gib)
    advance(1)
    batch = min(config.recipe.global_batch_size, index.num_samples)
    alone, per_cpu_s = _time_loading(index, config, batch, 0, seconds)
    advance(1)
    found: dict[int, float] = {}
    for number in workers:
        found[number] = _time_loading(index, config, batch, number, seconds)[0] if number else alone
        advance(1)
    speeds = tuple(
        Speed(number, speed, None if consume is None else wait_fraction(speed, consume))
        for number, speed in found.items()
    )
    worth = fewest_worth(found)
    return Report(index.location, index.num_samples, batch, reading, per_cpu_s, speeds, worth, consume)


def time_reading(index: ShardIndex, cache_gib: float) -> Reading:
    """Read shards once after dropping them from the page cache and once more from it; remote ones from their cache."""
    paths, total = [], 0
    for shard in index.shards:
        paths.append(local_path(shard, cache_gib))
        total += shard.filesize
        if total >= MOST_READ:
            break
    for path in paths:
        _forget(path)
    cold, warm = (_read_all(paths) for _ in range(2))
    return Reading(total, total / MB / cold if cold > 1.02 * warm else None, total / MB / warm)


def _forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)  # dirty pages are not dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read_all(paths: Sequence[Path]) -> float:
    """Seconds that it takes."""
    buffer = bytearray(CHUNK)
    began = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def _time_loading(
    index: ShardIndex, config: RunConfig, batch: int, workers: int, seconds: float
) -> tuple[float, float]:
    """(images/s, images per processor second of this process) of the training loader with so many processes."""
    data = replace(config.data, num_workers=workers)
    sizes = tuple(shard.nsamples for shard in index.shards)
    plan = TrainPlan(sizes, config.seed, batch, data.shuffle_shards, data.lanes, data.repeats)
    split = Split(index, data, config.seed, index.num_classes, 0, 1)
    loader: Loader = train_loader(plan, split, 1, range(MANY_STEPS))
    with closing(iter(loader)) as batches:  # pyright: ignore[reportArgumentType] (a generator)
        for _ in islice(batches, 1 + 2 * workers):  # what the processes had ready, or took longer for at first
            pass
        return _count(batches, seconds)


def _count(batches: Any, seconds: float) -> tuple[float, float]:
    images, began, used = 0, time.perf_counter(), time.process_time()
    batch: Batch
    for batch in batches:
        images += len(batch.labels)
        if time.perf_counter() - began >= seconds:
            break
    return images / (time.perf_counter() - began), images / max(1e-9, time.process_time() - used)


def draw(report: Report) -> bytes:
    """The speeds over the number of processes, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained", dpi=140)
    axes = figure.subplots()
    numbers = [str(speed.workers) for speed in report.speeds]
    colours = ["#2a78d6" if speed.workers == report.worth else "#9db7d6" for speed in report.speeds]
    bars = axes.bar(numbers, [speed.images_per_s for speed in report.speeds], color=colours, width=0.6)
    axes.bar_label(bars, fmt="%.0f")
    axes.margins(y=0.15)
    if report.consume_images_per_s is not None:
        axes.axhline(report.consume_images_per_s, color="#c2410c", linestyle="--", linewidth=1)
        axes.annotate("consumer", (0.995, report.consume_images_per_s), xycoords=("axes fraction", "data"),
                      ha="right", va="bottom", color="#c2410c")  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="loader processes (data.num_workers)", ylabel="images/s", title=f"{report.worth} are worth it")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
