"""The WebDataset pipeline from a plan to batches: locate the samples, decode what is seen of them, hand over.

The plan decides who reads what; loader workers take every W-th unit of their rank and DataLoader hands units back in
turn, so batches and pixels are the same for any number of workers.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import ceil
from multiprocessing.util import Finalize
from time import perf_counter
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from webdataset.pipeline import DataPipeline

from orchestrator.config import DataConfig
from orchestrator.data.augment import augment_batch
from orchestrator.data.decode import BatchDecoder, jobs_in_files
from orchestrator.data.forking import SureForkContext
from orchestrator.data.index import ShardIndex
from orchestrator.data.order import EvalPlan, TrainPlan, cut
from orchestrator.data.reader import ShardReader
from orchestrator.data.ring import Ring
from orchestrator.data.store import Counts
from orchestrator.data.transforms import BLOCKS, Views, eval_views, preprocessing_of, shift, train_size, train_views
from orchestrator.errors import DataError, OrchestratorError
from orchestrator.keyed import draws
from orchestrator.lineage import die_with_parent
from orchestrator.options import Crop, OnBad

MOST_OPEN = 512
"""Shards that a loader process keeps open at most; half of the descriptors that a process usually may have."""
REQUESTS_AHEAD = 2
PAD = -1
"""Sample number of a row that only fills a batch up; it carries no weight."""


class Batch(NamedTuple):
    """What a rank computes at once; its images are overwritten after the next batch but one was asked for."""

    images: torch.Tensor  # (B, 3, S, S) uint8
    labels: torch.Tensor  # (B,) int64
    ids: torch.Tensor  # (B,) int64 sample numbers, PAD for rows without weight
    step_size: int
    """Training: samples of the whole step over all ranks. Evaluation: of this batch."""
    skipped: int
    """Samples that `data.on_bad=skip` and `data.on_damage=quarantine` left out of this batch."""
    draws: torch.Tensor | None = None
    """(B,) int64 sample number x data.repeats + copy, which tells copies apart; None: the sample numbers do."""


class Request(NamedTuple):
    """One unit of work: the samples of one batch."""

    ids: np.ndarray  # (n,) int64
    copies: np.ndarray  # (n,) int64
    epoch: int
    rows: int
    """Rows of the batch; more than samples means padding."""
    size: int
    """Side of the images, in pixels."""
    step_size: int


class Filled(NamedTuple):
    """A batch as a loader process reports it: the images lie in its slot of the ring."""

    worker: int
    slot: int
    size: int
    labels: np.ndarray
    ids: np.ndarray
    step_size: int
    skipped: int
    counts: Counts = Counts()
    draws: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """What one rank reads of a shard set."""

    index: ShardIndex
    config: DataConfig
    seed: int
    num_classes: int
    rank: int
    world_size: int
    slices: int = 1
    """Training: slices of a step that the rank reads one after another."""


def _train_requests(plan: TrainPlan, split: Split, accumulate: int, steps: range) -> Iterator[Request]:
    units = split.slices * accumulate
    for unit in _of_this_worker(range(steps.start * units, steps.stop * units)):
        (step, within), everywhere = divmod(unit, units), split.world_size * split.slices
        number, part = divmod(within, accumulate)
        drawn = plan.rank_draws(range(step, step + 1), everywhere, split.rank * split.slices + number)
        mine = cut(len(drawn.ids), accumulate, part)
        ids, epoch = drawn.ids[mine], step // plan.steps_per_epoch
        size = train_size(split.config, epoch)
        yield Request(ids, drawn.copies[mine], epoch, len(ids), size, plan.step_size(step))


def _eval_requests(plan: EvalPlan, split: Split) -> Iterator[Request]:
    size = preprocessing_of(split.config).image_size
    for step in _of_this_worker(range(plan.steps)):
        ids = plan.batch(step, split.rank)
        yield Request(ids, np.zeros_like(ids), 0, plan.per_rank_batch_size, size, len(ids))


def _of_this_worker(units: range) -> range:
    worker = get_worker_info()
    return units[worker.id :: worker.num_workers] if worker else units


class TrainFinish:
    """Crop and flip by the numbers that belong to each sample; what follows the resize besides."""

    def __init__(self, split: Split):
        self._config, self._seed = split.config, split.seed

    def views_of(self, request: Request) -> Callable[[np.ndarray, np.ndarray], Views]:
        numbers = self._numbers(request)
        return lambda rows, sizes: train_views(sizes, numbers[rows], self._config)

    def finish(self, images: np.ndarray, request: Request) -> None:
        """Change the decoded images (n, 3, S, S) in place."""
        if self._config.crop is Crop.pad:
            images[:] = shift(images, self._numbers(request), self._config.padding)
        augment_batch(images, self._config, (self._seed, request.epoch), request.ids, request.copies)

    def _numbers(self, request: Request) -> np.ndarray:
        return draws((self._seed, request.epoch, "crop"), request.ids, request.copies, BLOCKS)


class EvalFinish:
    """The centre crop of every image."""

    def __init__(self, split: Split):
        self._spec = preprocessing_of(split.config)

    def views_of(self, request: Request) -> Callable[[np.ndarray, np.ndarray], Views]:
        return lambda rows, sizes: eval_views(sizes, self._spec)

    def finish(self, images: np.ndarray, request: Request) -> None: ...


@dataclass(frozen=True, slots=True)
class Work:
    """What a loader's processes do; picklable, for processes that are not forked."""

    split: Split
    requests: Callable[[], Iterator[Request]]
    finish: TrainFinish | EvalFinish
    length: int
    """Batches."""
    rows: int
    """Of the largest batch."""
    size: int
    """Of the largest image, in pixels."""
    open_shards: int
    """That are read from at a time."""


class Filler:
    """Decodes requests into the slots of a ring; one per loader process."""

    def __init__(self, split: Split, ring: Ring, finish: TrainFinish | EvalFinish, reader: ShardReader):
        self._split, self._ring, self._finish, self._reader = split, ring, finish, reader
        worker = get_worker_info()
        self._worker = worker.id if worker else 0
        config = split.config
        self._decoder = BatchDecoder(config.decode, config.interpolation, config.max_pixels)

    def fill(self, request: Request) -> Filled:
        slot, count = self._ring.next_slot(), len(request.ids)
        images = self._ring.images(self._worker, slot, request.rows, request.size).numpy()
        found = self._reader.locate(request.ids)
        self._require_labels(found.labels, request)
        jobs = jobs_in_files(found.descriptors, found.offsets, found.sizes)[~found.lost]
        faults = self._decoder.fill(jobs, self._finish.views_of(request), images[:count])
        self._finish.finish(images[:count], request)
        labels, ids = np.zeros(request.rows, np.int64), np.full(request.rows, PAD, np.int64)
        labels[:count], ids[:count] = found.labels, request.ids
        drawn = np.full(request.rows, PAD, np.int64)
        drawn[:count] = request.ids * self._split.config.repeats + request.copies
        images[count:] = 0
        if faults:
            self._require_skipping(faults, request)
        missing = faults.keys() | set(np.flatnonzero(found.lost).tolist())
        if missing:
            rows = _leave_out(missing, (images, labels, ids, drawn), count)
            labels, ids, drawn = labels[:rows], ids[:rows], drawn[:rows]
        counts = self._reader.take_counts()
        return Filled(self._worker, slot, request.size, labels, ids, request.step_size, len(missing), counts, drawn)

    def _require_labels(self, labels: np.ndarray, request: Request) -> None:
        wrong = np.flatnonzero(labels >= self._split.num_classes)
        if len(wrong):
            first = int(wrong[0])
            raise DataError(
                f"{self._reader.place(int(request.ids[first]))}: label {labels[first]} is outside the head's "
                f"0..{self._split.num_classes - 1}. Way out: raise model.num_classes, or pack the shards again with "
                "the right labels"
            )

    def _require_skipping(self, faults: dict[int, str], request: Request) -> None:
        if self._split.config.on_bad is OnBad.skip:
            return
        row = min(faults)
        raise DataError(
            f"{self._reader.place(int(request.ids[row]))}: {faults[row]}. Way out: data.on_bad=skip leaves such images "
            "out and counts them; `orchestrator shards verify` names them all"
        )


def _leave_out(missing: set[int], columns: tuple[np.ndarray, ...], count: int) -> int:
    """Move the good rows of images, labels, ids and draws together; returns how many rows the batch has.

    These are all rows where none is good or some pad.
    """
    good = np.array([row for row in range(count) if row not in missing], int)
    for column, rest in zip(columns, (0, 0, PAD, PAD), strict=True):
        column[: len(good)] = column[good]
        column[len(good) :] = rest
    rows = len(columns[0])
    return len(good) if len(good) and count == rows else rows


def open_reader(work: Work) -> ShardReader:
    config = work.split.config
    return ShardReader(work.split.index, config.cache_gib, config.on_damage, work.open_shards)


def _look_ahead(requests: Iterable[Request], reader: ShardReader) -> Iterator[Request]:
    """The requests as they come; the shards of the following ones are being fetched meanwhile."""
    waiting: deque[Request] = deque()
    for request in requests:
        reader.ahead(request.ids)
        waiting.append(request)
        if len(waiting) > REQUESTS_AHEAD:
            yield waiting.popleft()
    yield from waiting


def _fill_all(requests: Iterable[Request], work: Work, ring: Ring) -> Iterator[Filled | OrchestratorError]:
    """An error crosses the border of a loader process as an item: DataLoader would rewrap its text in a traceback."""
    try:
        with closing(open_reader(work)) as reader:
            filler = Filler(work.split, ring, work.finish, reader)
            for request in _look_ahead(requests, reader):
                yield filler.fill(request)
    except OrchestratorError as error:
        yield error


class Loader:
    """Batches of one rank; iterating starts the loader processes, and `wait_s` sums the time spent waiting for them."""

    def __init__(self, work: Work, device: torch.device | None = None, context: str = "fork"):
        self._work, self._context = work, context
        self._device = device
        self.wait_s = 0.0
        self._counts = Counts()

    def take_counts(self) -> Counts:
        """What reading the batches since the last call cost."""
        taken, self._counts = self._counts, Counts()
        return taken

    def __len__(self) -> int:
        return self._work.length

    def __iter__(self) -> Iterator[Batch]:
        work, config = self._work, self._work.split.config
        workers = config.num_workers
        ring = Ring(workers, config.prefetch_batches, work.rows * 3 * work.size**2, self._context == "fork")
        loader = DataLoader(
            DataPipeline(work.requests, partial(_fill_all, work=work, ring=ring)),  # pyright: ignore[reportArgumentType] (webdataset's stand-in type)
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=config.prefetch_batches if workers else None,
            multiprocessing_context=_context_of(self._context) if workers else None,
            worker_init_fn=_start_worker if workers else None,
        )
        with Transfer(ring, self._device) as transfer:
            items = iter(loader)
            # multiprocessing ends daemons by SIGTERM, which ours leave to the rank, and would wait for them forever
            Finalize(items, _end_workers, args=(ref(items),), exitpriority=0)
            try:
                for _ in range(self._work.length):
                    began = perf_counter()
                    transfer.wait_for_older()
                    item = next(items, None)
                    self.wait_s += perf_counter() - began
                    if isinstance(item, OrchestratorError):
                        raise item
                    assert item is not None, "the pipeline ended before the plan"
                    self._counts = self._counts.plus(item.counts)
                    yield transfer.take(item)
            finally:
                del items  # ends the loader processes now; left to an error's traceback, each costs 5 s of waiting


class Transfer:
    """From a slot of the ring to what the rank computes on: a view of it, or a copy on the GPU straight from pinned
    memory, finished before its slot can be filled again."""

    def __init__(self, ring: Ring, device: torch.device | None):
        self._ring = ring
        self._device = device if device is not None and device.type == "cuda" else None
        self._copies: deque[Any] = deque()

    def __enter__(self) -> Transfer:
        if self._device is not None:
            memory = self._ring.memory
            _check_cuda(_cuda().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        return self

    def __exit__(self, *_: object) -> None:
        if self._device is not None:
            torch.cuda.synchronize(self._device)
            _check_cuda(_cuda().cudaHostUnregister(self._ring.memory.data_ptr()))

    def wait_for_older(self) -> None:
        """Wait for all copies but the newest."""
        while len(self._copies) > 1:
            self._copies.popleft().synchronize()

    def take(self, item: Filled) -> Batch:
        images = self._ring.images(item.worker, item.slot, len(item.ids), item.size)
        labels, ids = torch.from_numpy(item.labels), torch.from_numpy(item.ids)
        if self._device is not None:
            images = images.to(self._device, non_blocking=True)
            labels = labels.to(self._device)
            self._copies.append(torch.cuda.Event())
            self._copies[-1].record()
        drawn = ids if item.draws is None else torch.from_numpy(item.draws)
        return Batch(images, labels, ids, item.step_size, item.skipped, drawn)


def _cuda() -> Any:
    return torch.cuda.cudart()


def _check_cuda(code: Any) -> None:
    torch.cuda.check_error(int(code))


def _context_of(name: str) -> str | SureForkContext:
    return SureForkContext() if name == "fork" else name


def _as_it_is(item: Any) -> Any:
    return item


def _end_workers(iterator: Callable[[], Any]) -> None:
    """At the end of the process: torch's handler would take these deaths for a failure."""
    workers = getattr(iterator(), "_workers", ())
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()


def _start_worker(worker: int) -> None:
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the rank decides when it stops
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def train_loader(
    plan: TrainPlan,
    split: Split,
    accumulate: int,
    steps: range,
    device: torch.device | None = None,
    context: str = "fork",
) -> Loader:
    """Batches for the steps `steps` of the run, `accumulate` parts of each slice."""
    requests = partial(_train_requests, plan, split, accumulate, steps)
    step = ceil(plan.num_samples / plan.steps_per_epoch)
    rows = ceil(ceil(step / (split.world_size * split.slices)) / accumulate)
    work = Work(
        split,
        requests,
        TrainFinish(split),
        len(steps) * split.slices * accumulate,
        rows,
        split.config.image_size,
        _open_shards(plan, split),
    )
    return Loader(work, device, context)


def _open_shards(plan: TrainPlan, split: Split) -> int:
    return min(MOST_OPEN, plan.shards_at_once(split.world_size))


def eval_loader(plan: EvalPlan, split: Split, device: torch.device | None = None, context: str = "fork") -> Loader:
    """Every sample of the set once over all ranks, rows that fill up carry PAD as their number."""
    size = preprocessing_of(split.config).image_size
    requests = partial(_eval_requests, plan, split)
    work = Work(split, requests, EvalFinish(split), plan.steps, plan.per_rank_batch_size, size, 0)
    return Loader(work, device, context)
