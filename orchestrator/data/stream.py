"""The WebDataset pipeline from a plan to batches: seek to the sample, decode, transform, assemble.

The plan decides who reads what; loader workers take every W-th unit of their rank and DataLoader hands units back in
turn, so batches and pixels are the same for any number of workers.
"""

from __future__ import annotations

import os
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from webdataset.pipeline import DataPipeline

from orchestrator.config import DataConfig
from orchestrator.data.fetch import local_path
from orchestrator.data.images import ImageError, decode_image
from orchestrator.data.index import Members, ShardIndex, load_members
from orchestrator.data.order import EvalPlan, TrainPlan, cut, keyed_rng
from orchestrator.data.transforms import eval_pixels, preprocessing_of, train_pixels
from orchestrator.errors import DataError, OrchestratorError
from orchestrator.options import OnBad

OPEN_SHARDS = 64
PAD = -1
"""Sample number of a row that only fills a batch up; it carries no weight."""


class Batch(NamedTuple):
    """What a rank computes at once."""

    images: torch.Tensor  # (B, 3, S, S) uint8
    labels: torch.Tensor  # (B,) int64
    ids: torch.Tensor  # (B,) int64 sample numbers, PAD for rows without weight
    step_size: int
    """Training: samples of the whole step over all ranks. Evaluation: of this batch."""
    skipped: int
    """Unreadable samples that `data.on_bad=skip` left out of this batch."""


class Request(NamedTuple):
    """One unit of work: the samples of one batch."""

    ids: np.ndarray  # (n,) int64
    epoch: int
    rows: int
    """Rows of the batch; more than samples means padding."""
    step_size: int


class Sample(NamedTuple):
    """One sample as it lies in its shard."""

    id: int
    key: str
    image: bytes
    label: int
    place: str


@dataclass(frozen=True, slots=True)
class Split:
    """What one rank reads of a shard set."""

    index: ShardIndex
    config: DataConfig
    seed: int
    num_classes: int
    rank: int
    world_size: int


class ShardReader:
    """Random access to the samples of a set; keeps the most recently used shards open."""

    def __init__(self, index: ShardIndex):
        self._index = index
        self._starts = np.cumsum([0, *(shard.nsamples for shard in index.shards)])
        self._open: OrderedDict[int, tuple[int, Members]] = OrderedDict()

    def read(self, id: int) -> Sample:
        """The sample with this number. Raises DataError where its bytes are not all there."""
        shard_number = int(np.searchsorted(self._starts, id, side="right")) - 1
        descriptor, members = self._shard(shard_number)
        row = id - int(self._starts[shard_number])
        offset, size = int(members.image_offset[row]), int(members.image_size[row])
        member = f"{members.keys[row]}.{members.extension[row]}"
        place = f"{self._index.shards[shard_number].location}, member {member}, offset {offset}"
        image = os.pread(descriptor, size, offset)
        if len(image) != size:
            raise DataError(
                f"{place}: {len(image)} of {size} bytes. Way out: `orchestrator shards verify` names all faults"
            )
        return Sample(id, members.keys[row], image, int(members.label[row]), place)

    def _shard(self, number: int) -> tuple[int, Members]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self._index.shards[number]
        path = local_path(shard)
        entry = os.open(path, os.O_RDONLY), load_members(path, shard)
        self._open[number] = entry
        if len(self._open) > OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        return entry

    def close(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _train_requests(plan: TrainPlan, split: Split, accumulate: int, steps: range) -> Iterator[Request]:
    for unit in _of_this_worker(range(steps.start * accumulate, steps.stop * accumulate)):
        step, part = divmod(unit, accumulate)
        batch = plan.batch(step)
        mine = batch[cut(len(batch), split.world_size, split.rank)]
        ids = mine[cut(len(mine), accumulate, part)]
        yield Request(ids, step // plan.steps_per_epoch, len(ids), len(batch))


def _eval_requests(plan: EvalPlan, rank: int) -> Iterator[Request]:
    for step in _of_this_worker(range(plan.steps)):
        ids = plan.batch(step, rank)
        yield Request(ids, 0, plan.per_rank_batch_size, len(ids))


def _of_this_worker(units: range) -> range:
    worker = get_worker_info()
    return units[worker.id :: worker.num_workers] if worker else units


def _read(index: ShardIndex, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
    with closing(ShardReader(index)) as reader:
        for request in requests:
            yield request, [reader.read(int(id)) for id in request.ids]


def _assemble(
    work: Iterable[tuple[Request, list[Sample]]], split: Split, pixels: Callable[[np.ndarray, Request, int], np.ndarray]
) -> Iterator[Batch]:
    size = split.config.image_size
    for request, samples in work:
        images = np.zeros((request.rows, 3, size, size), np.uint8)
        labels = np.zeros(request.rows, np.int64)
        ids = np.full(request.rows, PAD, np.int64)
        good = 0
        for sample in samples:
            image = _decode(sample, split)
            if image is not None:
                images[good], labels[good], ids[good] = pixels(image, request, sample.id), sample.label, sample.id
                good += 1
        rows = good if request.rows == len(samples) and good else request.rows
        images, labels, ids = (torch.from_numpy(array[:rows]) for array in (images, labels, ids))
        yield Batch(images, labels, ids, request.step_size, len(samples) - good)


def _decode(sample: Sample, split: Split) -> np.ndarray | None:
    """Pixels of a sample; None where it is unreadable and may be skipped."""
    if sample.label >= split.num_classes:
        raise DataError(
            f"{sample.place}: label {sample.label} is outside the head's 0..{split.num_classes - 1}. "
            "Way out: raise model.num_classes, or pack the shards again with the right labels"
        )
    try:
        return decode_image(sample.image, split.config.max_pixels)[0]
    except ImageError as error:
        if split.config.on_bad is OnBad.skip:
            return None
        raise DataError(
            f"{sample.place}: {error}. Way out: data.on_bad=skip leaves such images out and counts them; "
            "`orchestrator shards verify` names them all"
        ) from None


def _errors_as_items(items: Iterator[Batch]) -> Iterator[Batch | OrchestratorError]:
    """An error crosses the border of a loader process as an item: DataLoader would rewrap its text in a traceback."""
    try:
        yield from items
    except OrchestratorError as error:
        yield error


class Loader:
    """Batches of one rank; iterating starts the loader processes, and `wait_s` sums the time spent waiting for them."""

    def __init__(self, pipeline: DataPipeline, length: int, config: DataConfig, pin_memory: bool):
        self._length, self.wait_s = length, 0.0
        workers = config.num_workers
        self._loader = DataLoader(
            pipeline,  # pyright: ignore[reportArgumentType] (webdataset declares a stand-in where torch is missing)
            batch_size=None,
            num_workers=workers,
            prefetch_factor=config.prefetch_batches if workers else None,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_start_worker if workers else None,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        items = iter(self._loader)
        try:
            for _ in range(self._length):
                began = perf_counter()
                item = next(items, None)
                self.wait_s += perf_counter() - began
                if isinstance(item, OrchestratorError):
                    raise item
                assert item is not None, "the pipeline ended before the plan"
                yield item
        finally:
            del items  # ends the loader processes now; left to an error's traceback, each costs 5 s of waiting


def _start_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the rank decides when it stops
    torch.set_num_threads(1)


def train_loader(plan: TrainPlan, split: Split, accumulate: int, steps: range, pin_memory: bool) -> Loader:
    """Batches for the steps `steps` of the run, `accumulate` parts each."""

    def pixels(image: np.ndarray, request: Request, id: int) -> np.ndarray:
        return train_pixels(image, split.config, keyed_rng(split.seed, request.epoch, id, "augment"))

    pipeline = _pipeline(split, lambda: _train_requests(plan, split, accumulate, steps), pixels)
    return Loader(pipeline, len(steps) * accumulate, split.config, pin_memory)


def eval_loader(plan: EvalPlan, split: Split, pin_memory: bool) -> Loader:
    """Every sample of the set once over all ranks, rows that fill up carry PAD as their number."""
    spec = preprocessing_of(split.config)
    pipeline = _pipeline(split, lambda: _eval_requests(plan, split.rank), lambda image, *_: eval_pixels(image, spec))
    return Loader(pipeline, plan.steps, split.config, pin_memory)


def _pipeline(
    split: Split, requests: Callable[[], Iterator[Request]], pixels: Callable[[np.ndarray, Request, int], np.ndarray]
) -> DataPipeline:
    return DataPipeline(
        requests,
        lambda items: _read(split.index, items),
        lambda items: _assemble(items, split, pixels),
        _errors_as_items,
    )
