"""What every layout of shards, ranks, loader processes and batches keeps: each sample once, equal steps, same bits."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from orchestrator.config import DataConfig
from orchestrator.data import ring, stream
from orchestrator.data.index import ShardIndex, load_index
from orchestrator.data.order import EvalPlan, TrainPlan
from orchestrator.data.stream import PAD, Batch, Loader, Split, eval_loader, train_loader
from orchestrator.options import Augment
from tests.data.test_stream import CLASSES, SEED, config, label_of, make_set

__all__ = ["config"]

SIZES = (3, 1, 7, 2, 5, 4, 9, 1, 6)
WORLDS = (1, 2, 3)
WORKERS = (0, 1, 2)
BATCHES = (3, 4, 7)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ShardIndex]:
    """Sets of 1 to 9 uneven shards."""
    root = tmp_path_factory.mktemp("layouts")
    return {n: load_index(str(make_set(root / f"of-{n}", SIZES[:n]))) for n in range(1, 10)}


def plan_of(index: ShardIndex, batch: int) -> TrainPlan:
    return TrainPlan(tuple(shard.nsamples for shard in index.shards), SEED, batch, 2)


def split_of(index: ShardIndex, config: DataConfig, rank: int, world: int, workers: int) -> Split:
    return Split(index, replace(config, num_workers=workers), SEED, CLASSES, rank, world)


def batches_in_process(loader: Loader, workers: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    """What a loader yields, its processes played one after the other in this one."""
    work = loader._work
    played = []
    for worker in range(max(1, workers)):
        info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
        monkeypatch.setattr(stream, "get_worker_info", lambda info=info: info)
        memory = ring.Ring(workers, work.split.config.prefetch_batches, work.rows * 3 * work.size**2, True)
        items = []
        for item in stream._fill_all(work.requests(), work, memory):
            assert isinstance(item, stream.Filled)
            images = memory.images(item.worker, item.slot, len(item.ids), item.size).clone()
            items.append(Batch(images, *map(torch.from_numpy, (item.labels, item.ids)), item.step_size, item.skipped))
        played.append(iter(items))
    for _, player in zip(range(len(loader)), itertools.cycle(played), strict=False):
        yield next(player)


def ids_of(batch: Batch) -> list[int]:
    return [id for id in batch.ids.tolist() if id != PAD]


@pytest.mark.parametrize("shards", range(1, 10))
def test_every_layout_reads_each_sample_once_in_equal_steps_with_the_same_pixels(
    shards: int, sets: dict[int, ShardIndex], config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = sets[shards]
    for batch in BATCHES:
        plan = plan_of(index, batch)
        alone = None
        for world, workers in itertools.product(WORLDS, WORKERS):
            if plan.num_samples // plan.steps_per_epoch < world:
                continue  # refused before a run starts: some rank would have no sample in some step
            ranks = [
                list(batches_in_process(
                    train_loader(plan, split_of(index, config, rank, world, workers), 1, range(plan.steps_per_epoch)),
                    workers, monkeypatch,
                ))
                for rank in range(world)
            ]  # fmt: skip
            assert {len(batches) for batches in ranks} == {plan.steps_per_epoch}
            seen = [id for batches in ranks for one in batches for id in ids_of(one)]
            assert sorted(seen) == list(range(index.num_samples))
            joined = [torch.cat([batches[step].images for batches in ranks]) for step in range(plan.steps_per_epoch)]
            alone = alone or joined
            assert all(torch.equal(left, right) for left, right in zip(alone, joined, strict=True))


def hits_of(batches: list[Batch]) -> tuple[int, int]:
    """As if a network guessed label 3 for everyone: hits and count."""
    rows = [row for batch in batches for row in zip(batch.labels.tolist(), batch.ids.tolist(), strict=True)]
    kept = [(label, id) for label, id in rows if id != PAD]
    assert all(label == label_of(id) for label, id in kept)
    return sum(label == 3 for label, _ in kept), len(kept)


@pytest.mark.parametrize("shards", range(1, 10))
def test_every_layout_evaluates_each_image_once_and_finds_the_same_fraction(
    shards: int, sets: dict[int, ShardIndex], config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, fractions = sets[shards], set()
    for batch, world, workers in itertools.product(BATCHES, WORLDS, WORKERS):
        plan = EvalPlan(index.num_samples, batch, world)
        ranks = [
            list(
                batches_in_process(
                    eval_loader(plan, split_of(index, config, rank, world, workers)), workers, monkeypatch
                )
            )
            for rank in range(world)
        ]
        assert {len(batches) for batches in ranks} == {plan.steps}
        hits, counts = zip(*map(hits_of, ranks), strict=True)
        assert sum(counts) == index.num_samples
        fractions.add(Fraction(sum(hits), sum(counts)))
    assert len(fractions) == 1


LAYOUTS = [
    ("fork", (9, 1, 2, 4)), ("fork", (1, 2, 2, 4)), ("fork", (5, 3, 1, 7)), ("fork", (2, 3, 2, 3)),
    ("fork", (7, 2, 1, 3)),
    ("fork", (3, 1, 1, 7)), ("forkserver", (3, 2, 1, 4)), ("spawn", (1, 1, 2, 3)),
]  # fmt: skip
SLOW_LAYOUTS = [
    ("forkserver", (9, 1, 2, 7)),
    ("forkserver", (1, 3, 2, 3)),
    ("spawn", (9, 2, 2, 4)),
    ("spawn", (4, 3, 1, 7)),
]


@pytest.mark.parametrize(
    ("context", "layout"),
    [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.slow) for layout in SLOW_LAYOUTS)],
)
def test_real_loader_processes_of_every_kind_keep_all_this(
    context: str, layout: tuple[int, int, int, int], sets: dict[int, ShardIndex], config: DataConfig
) -> None:
    shards, world, workers, batch = layout
    index, plan = sets[shards], plan_of(sets[shards], batch)
    seen, seen_in_evaluation = [], []
    for rank in range(world):
        split = split_of(index, config, rank, world, workers)
        here = split_of(index, config, rank, world, 0)
        steps = range(plan.steps_per_epoch)
        expected = [one._replace(images=one.images.clone()) for one in train_loader(plan, here, 1, steps)]
        count = 0
        for one, wanted in zip(train_loader(plan, split, 1, steps, context=context), expected, strict=True):
            assert torch.equal(one.images, wanted.images)
            assert torch.equal(one.ids, wanted.ids)
            seen += ids_of(one)
            count += 1
        assert count == plan.steps_per_epoch
        evaluated = eval_loader(EvalPlan(index.num_samples, batch, world), split, context=context)
        seen_in_evaluation += [id for one in evaluated for id in ids_of(one)]
    assert sorted(seen) == sorted(seen_in_evaluation) == list(range(index.num_samples))


@pytest.mark.parametrize(("before", "after"), [((1, 0), (3, 2)), ((2, 1), (1, 2)), ((3, 2), (2, 0))])
def test_stopping_at_every_step_and_going_on_elsewhere_reads_what_an_undisturbed_run_reads(
    before: tuple[int, int],
    after: tuple[int, int],
    sets: dict[int, ShardIndex],
    config: DataConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index, plan = sets[6], plan_of(sets[6], 5)
    total = 2 * plan.steps_per_epoch

    def global_batches(steps: range, layout: tuple[int, int]) -> list[tuple[list[int], bytes]]:
        world, workers = layout
        ranks = [
            list(batches_in_process(
                train_loader(plan, split_of(index, config, rank, world, workers), 1, steps), workers, monkeypatch
            ))
            for rank in range(world)
        ]  # fmt: skip
        parts = zip(*ranks, strict=True)
        return [
            ([id for part in step for id in ids_of(part)], b"".join(part.images.numpy().tobytes() for part in step))
            for step in parts
        ]

    undisturbed = global_batches(range(total), (1, 0))
    for stop in range(1, total):
        assert global_batches(range(stop), before) + global_batches(range(stop, total), after) == undisturbed


def test_a_batch_stays_as_it_is_until_the_next_but_one_is_asked_for(
    sets: dict[int, ShardIndex], config: DataConfig
) -> None:
    """The loader processes get all the time they want to run ahead into memory that is still in use."""
    plan = plan_of(sets[9], 3)
    split = split_of(sets[9], replace(config, prefetch_batches=1), 0, 1, 2)
    held: Batch | None = None
    copy = torch.zeros(0)
    for batch in train_loader(plan, split, 1, range(plan.steps_per_epoch)):
        time.sleep(0.05)
        if held is not None:
            assert torch.equal(held.images, copy)
        held, copy = batch, batch.images.clone()


def test_the_image_of_a_progressive_run_grows_without_new_loader_processes(
    sets: dict[int, ShardIndex], config: DataConfig
) -> None:
    ramp = replace(config, image_size=96, ramp_from=32, ramp_epochs=[0, 2], padding=0, num_workers=1)
    plan = plan_of(sets[3], 4)
    split = Split(sets[3], ramp, SEED, CLASSES, 0, 1)
    sides = [batch.images.shape[-1] for batch in train_loader(plan, split, 1, range(3 * plan.steps_per_epoch))]
    assert sides == [side for side in (32, 64, 96) for _ in range(plan.steps_per_epoch)]


def test_an_augmented_batch_is_the_same_for_any_number_of_ranks_and_loader_processes(
    sets: dict[int, ShardIndex], config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of one image differ from each other, though they are drawn in the same epoch."""
    index = sets[4]
    policy = replace(config, augment=Augment.randaugment, color_jitter=[0.4, 0.4, 0.4, 0.1])
    plan = TrainPlan(tuple(shard.nsamples for shard in index.shards), SEED, 4, 2, repeats=2)
    alone: list[torch.Tensor] = []
    for world, workers in ((1, 0), (1, 2), (3, 1)):
        loaders = [
            train_loader(plan, split_of(index, policy, rank, world, workers), 1, range(plan.steps_per_epoch))
            for rank in range(world)
        ]
        ranks = [list(batches_in_process(loader, workers, monkeypatch)) for loader in loaders]
        joined = [torch.cat([batches[step].images for batches in ranks]) for step in range(plan.steps_per_epoch)]
        alone = alone or joined
        assert all(torch.equal(left, right) for left, right in zip(alone, joined, strict=True))
    images, ids = torch.cat(alone), torch.cat([torch.from_numpy(plan.batch(s)) for s in range(plan.steps_per_epoch)])
    twins = [images[ids == id] for id in ids.unique() if (ids == id).sum() == 2]
    assert twins
    assert all(not torch.equal(first, second) for first, second in twins)
