"""From tars to batches: bit-identical for any number of loader processes, exact over ranks, faults named."""

from __future__ import annotations

import gc
import io
import itertools
import multiprocessing
import os
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.compose import compose
from orchestrator.config import DataConfig
from orchestrator.data.index import ShardIndex, load_index
from orchestrator.data.indexing import index_tars
from orchestrator.data.order import EvalPlan, TrainPlan
from orchestrator.data.reader import ShardReader
from orchestrator.data.stream import PAD, Batch, Split, eval_loader, train_loader
from orchestrator.errors import EXIT_USER, DataError
from orchestrator.options import Crop, OnBad

SIZES = (5, 1, 9, 3, 4)
SIDE = 10
CLASSES = 7
BATCH = 4
SEED = 11
DAMAGED = 8  # third shard, third sample


def label_of(id: int) -> int:
    return id * 3 % CLASSES


def image_of(id: int) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8, another for each sample."""
    return np.random.default_rng(id).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_set(folder: Path, sizes: Iterable[int], broken: Iterable[int] = ()) -> Path:
    """Shards whose sample `id` is `image_of(id)` with `label_of(id)`; of broken ones half the bytes are missing."""
    folder.mkdir()
    ids = itertools.count()
    for number, size in enumerate(sizes):
        with tarfile.open(folder / f"x-{number:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for id in itertools.islice(ids, size):
                data = png(image_of(id))
                data = data[: len(data) // 2] if id in broken else data
                for name, content in ((f"s{id:04d}.cls", str(label_of(id)).encode()), (f"s{id:04d}.png", data)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    index_tars(str(folder), "cls", None, lambda _: None)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return load_index(str(make_set(tmp_path_factory.mktemp("sets") / "sound", SIZES)))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return load_index(str(make_set(tmp_path_factory.mktemp("sets") / "single", (13,))))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return load_index(str(make_set(tmp_path_factory.mktemp("sets") / "damaged", SIZES, {DAMAGED})))


@pytest.fixture(scope="module")
def config() -> DataConfig:
    data = compose(["data=synthetic", "data.num_workers=0", f"data.image_size={SIDE}"]).config.data
    return replace(data, flip=0.5, padding=3)


def as_they_are(config: DataConfig) -> DataConfig:
    """Training without randomness, so that a batch holds the very images."""
    return replace(config, crop=Crop.none, flip=0.0)


def split_of(index: ShardIndex, config: DataConfig, rank: int = 0, world: int = 1) -> Split:
    return Split(index, config, SEED, CLASSES, rank, world)


def plan_of(index: ShardIndex, batch: int = BATCH) -> TrainPlan:
    return TrainPlan(tuple(shard.nsamples for shard in index.shards), SEED, batch, 2)


def keep(loader: Iterable[Batch]) -> list[Batch]:
    """All batches: the loader uses the memory of their images again."""
    return [batch._replace(images=batch.images.clone()) for batch in loader]


def train(split: Split, accumulate: int = 1, steps: range | None = None, batch: int = BATCH) -> list[Batch]:
    plan = plan_of(split.index, batch)
    return keep(train_loader(plan, split, accumulate, steps or range(2 * plan.steps_per_epoch)))


def evaluate(split: Split, batch: int = 3) -> list[Batch]:
    plan = EvalPlan(split.index.num_samples, batch, split.world_size)
    return keep(eval_loader(plan, split))


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.ids, b.ids)
        and (a.step_size, a.skipped) == (b.step_size, b.skipped)
        for a, b in zip(left, right, strict=True)
    )


def join(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "ids"))  # type: ignore[return-value]


def real(batches: Iterable[Batch]) -> list[int]:
    return [int(id) for batch in batches for id in batch.ids if id != PAD]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_holds_the_image_and_the_label_of_its_number(sound: ShardIndex, config: DataConfig, workers: int) -> None:
    split = split_of(sound, replace(as_they_are(config), num_workers=workers))
    for batch in [*train(split), *evaluate(split)]:
        assert (batch.images.dtype, batch.labels.dtype, batch.ids.dtype) == (torch.uint8, torch.int64, torch.int64)
        assert batch.images.shape == (len(batch.ids), 3, SIDE, SIDE)
        for image, label, id in zip(batch.images, batch.labels, batch.ids, strict=True):
            if id != PAD:
                assert label == label_of(int(id))
                assert np.array_equal(image.numpy(), image_of(int(id)).transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["sound", "single"])
def test_batches_are_bit_identical_for_any_number_of_loader_processes(
    name: str, config: DataConfig, request: pytest.FixtureRequest
) -> None:
    index = request.getfixturevalue(name)
    for rank in range(3):
        loaded = [
            (train(split, 1, range(3, 9)), evaluate(split))
            for workers in (0, 1, 2)
            for split in [split_of(index, replace(config, num_workers=workers), rank, 3)]
        ]
        for trained, evaluated in loaded[1:]:
            assert same(trained, loaded[0][0])
            assert same(evaluated, loaded[0][1])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_together_see_the_batches_of_one_process(sound: ShardIndex, config: DataConfig, world: int) -> None:
    whole = train(split_of(sound, config))
    ranks = [train(split_of(sound, config, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    for step, reference in enumerate(whole):
        images, labels, ids = join([batches[step] for batches in ranks])
        assert torch.equal(ids, reference.ids)
        assert torch.equal(labels, reference.labels)
        assert torch.equal(images, reference.images)
        assert {batches[step].step_size for batches in ranks} == {len(reference.ids)}
    steps = plan_of(sound).steps_per_epoch
    for epoch in (whole[:steps], whole[steps:]):
        assert sorted(real(epoch)) == list(range(sum(SIZES)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [0, 1, 5, 6, 7, 11])
def test_a_loader_that_starts_later_yields_exactly_the_tail(
    sound: ShardIndex, config: DataConfig, first: int, workers: int
) -> None:
    plan = plan_of(sound)
    assert plan.steps_per_epoch == 6
    split = split_of(sound, config, 1, 2)
    late = train(replace(split, config=replace(config, num_workers=workers)), 1, range(first, 12))
    assert same(late, train(split, 1, range(12))[first:])


def test_the_parts_of_a_step_join_to_the_share_of_the_rank(sound: ShardIndex, config: DataConfig) -> None:
    for rank in range(2):
        split = split_of(sound, config, rank, 2)
        whole, parts = train(split, batch=8), train(split, 3, batch=8)
        assert len(parts) == 3 * len(whole)
        for step, reference in enumerate(whole):
            for joined, tensor in zip(join(parts[3 * step : 3 * step + 3]), reference[:3], strict=True):
                assert torch.equal(joined, tensor)
            assert {part.step_size for part in parts[3 * step : 3 * step + 3]} == {reference.step_size}


def test_pixels_of_a_sample_change_from_epoch_to_epoch_and_with_the_seed(sound: ShardIndex, config: DataConfig) -> None:
    def by_id(batches: list[Batch]) -> list[torch.Tensor]:
        images, _, ids = join(batches)
        return list(images[ids.argsort()])

    split = split_of(sound, config)
    first, second = by_id(train(split)[:6]), by_id(train(split)[6:])
    other = by_id(train(replace(split, seed=SEED + 1))[:6])
    assert sum(torch.equal(a, b) for a, b in zip(first, second, strict=True)) < 3
    assert sum(torch.equal(a, b) for a, b in zip(first, other, strict=True)) < 3


@pytest.mark.parametrize(("world", "batch", "workers"), [(1, 3, 0), (2, 3, 2), (3, 5, 0), (4, 7, 2), (3, 50, 0)])
def test_evaluation_pads_with_rows_without_number_and_meets_each_sample_once(
    sound: ShardIndex, config: DataConfig, world: int, batch: int, workers: int
) -> None:
    config = replace(config, num_workers=workers)
    ranks = [evaluate(split_of(sound, config, rank, world), batch) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(b.ids) == batch for batches in ranks for b in batches), "all ranks take steps of one size"
    assert sorted(real(itertools.chain(*ranks))) == list(range(sum(SIZES)))
    for b in itertools.chain(*ranks):
        assert not b.images[b.ids == PAD].any()
        assert not b.labels[b.ids == PAD].any()


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_damaged_sample_ends_the_run_with_its_place_also_out_of_a_loader_process(
    damaged: ShardIndex, config: DataConfig, workers: int, kind: str
) -> None:
    split = split_of(damaged, replace(config, num_workers=workers))
    with pytest.raises(DataError) as caught:
        train(split) if kind == "train" else evaluate(split)
    text = str(caught.value)
    assert type(caught.value) is DataError
    assert caught.value.exit_code == EXIT_USER
    assert f"{damaged.shards[2].location}, member s{DAMAGED:04d}.png, offset " in text
    assert "Way out: data.on_bad=skip" in text
    assert "Traceback" not in text
    offset = int(text.partition("offset ")[2].partition(":")[0])
    with open(damaged.shards[2].location, "rb") as file:
        file.seek(offset)
        assert file.read(8) == png(image_of(DAMAGED))[:8]


def take_one_and_end(split: Split) -> None:
    """As a program that ends with an epoch begun: nothing closes the loader."""
    plan = plan_of(split.index)
    globals()["left_open"] = batches = iter(train_loader(plan, split, 1, range(2 * plan.steps_per_epoch)))
    next(batches)


def test_a_process_ends_although_its_loader_is_open(sound: ShardIndex, config: DataConfig) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=take_one_and_end, args=(split_of(sound, replace(config, num_workers=2)),)
    )
    process.start()
    process.join(60)
    stuck = process.is_alive()
    process.kill()
    assert not stuck
    assert process.exitcode == 0


def test_an_error_ends_the_loader_processes_at_once(damaged: ShardIndex, config: DataConfig) -> None:
    with pytest.raises(DataError) as caught:
        evaluate(split_of(damaged, replace(config, num_workers=2)))
    assert caught.value.__traceback__
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_before_a_damaged_sample_still_arrive(damaged: ShardIndex, config: DataConfig, workers: int) -> None:
    split = split_of(damaged, replace(config, num_workers=workers))
    batches = iter(eval_loader(EvalPlan(damaged.num_samples, 3, 1), split))
    assert real(next(batches) for _ in range(DAMAGED // 3)) == list(range(DAMAGED // 3 * 3))
    with pytest.raises(DataError):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_leaves_the_damaged_sample_out_counts_it_and_changes_no_other(
    damaged: ShardIndex, sound: ShardIndex, config: DataConfig, workers: int
) -> None:
    skipping = replace(config, on_bad=OnBad.skip, num_workers=workers)
    for load in (train, evaluate):
        got, whole = load(split_of(damaged, skipping)), load(split_of(sound, config))
        assert len(got) == len(whole)
        assert sum(batch.skipped for batch in got) == sum(batch.ids.tolist().count(DAMAGED) for batch in whole) > 0
        for batch, reference in zip(got, whole, strict=True):
            kept = reference.ids != DAMAGED
            assert torch.equal(batch.ids, reference.ids[kept])
            assert torch.equal(batch.labels, reference.labels[kept])
            assert torch.equal(batch.images, reference.images[kept])
            assert batch.skipped == int((~kept).sum())


def test_a_batch_that_loses_all_its_samples_keeps_a_row_without_weight(damaged: ShardIndex, config: DataConfig) -> None:
    batches = train(split_of(damaged, replace(config, on_bad=OnBad.skip)), batch=1)
    empty = [batch for batch in batches if batch.skipped]
    assert len(empty) == 2
    assert all(batch.ids.tolist() == [PAD] and batch.images.shape == (1, 3, SIDE, SIDE) for batch in empty)
    assert sorted(real(batches)) == sorted(2 * [id for id in range(sum(SIZES)) if id != DAMAGED])


def test_a_padded_batch_that_loses_a_sample_keeps_its_size(tmp_path: Path, config: DataConfig) -> None:
    index = load_index(str(make_set(tmp_path / "set", (5,), {3})))
    first, last = evaluate(split_of(index, replace(config, on_bad=OnBad.skip)), 3)
    assert (first.ids.tolist(), first.skipped) == ([0, 1, 2], 0)
    assert (last.ids.tolist(), last.skipped) == ([4, PAD, PAD], 1)


@pytest.mark.parametrize("on_bad", list(OnBad))
@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_beyond_the_head_ends_the_run_even_where_damage_is_skipped(
    sound: ShardIndex, config: DataConfig, on_bad: OnBad, workers: int
) -> None:
    split = replace(split_of(sound, replace(config, on_bad=on_bad, num_workers=workers)), num_classes=CLASSES - 1)
    with pytest.raises(DataError, match=r"x-000\.tar, member s0002\.png.*label 6 .*head's 0\.\.5.*num_classes"):
        evaluate(split)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", [-512, 512])
def test_a_shard_of_another_size_than_its_index_says_is_stale(
    tmp_path: Path, config: DataConfig, workers: int, change: int
) -> None:
    index = load_index(str(make_set(tmp_path / "set", SIZES)))
    path = Path(index.shards[2].location)
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(DataError, match=r"x-002\.tar.*bytes, the index says.*Way out"):
        evaluate(split_of(index, replace(config, num_workers=workers)))


def test_a_shard_that_vanished_is_named(tmp_path: Path, config: DataConfig) -> None:
    index = load_index(str(make_set(tmp_path / "set", SIZES)))
    Path(index.shards[4].location).unlink()
    with pytest.raises(DataError, match=r"x-004\.tar.*does not exist.*Way out"):
        train(split_of(index, config))


def test_bytes_that_vanish_while_a_shard_is_open_are_missed(tmp_path: Path) -> None:
    index = load_index(str(make_set(tmp_path / "set", (5,))))
    reader = ShardReader(index)
    first = reader.read(0)
    assert (first.id, first.key, first.label, first.image) == (0, "s0000", label_of(0), png(image_of(0)))
    os.truncate(index.shards[0].location, 4096)
    with pytest.raises(DataError, match=r"x-000\.tar, member s0004\.png.*: 0 of \d+ bytes.*Way out"):
        reader.read(4)
    reader.close()


def test_no_pass_leaves_files_open(sound: ShardIndex, damaged: ShardIndex, config: DataConfig) -> None:
    train(split_of(sound, config))
    gc.collect()  # what an earlier test left to it is not ours to count
    before = open_files()
    train(split_of(sound, config))
    evaluate(split_of(sound, config))
    with pytest.raises(DataError):
        evaluate(split_of(damaged, config))
    abandoned = iter(eval_loader(EvalPlan(sound.num_samples, 3, 1), split_of(sound, config)))
    next(abandoned)
    del abandoned
    gc.collect()  # an error holds its frames, and they the shards, for as long as it is looked at
    assert open_files() == before


def test_a_reader_holds_a_bounded_number_of_shards_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.data.reader.OPEN_SHARDS", 2)
    index = load_index(str(make_set(tmp_path / "set", (2,) * 6)))
    reader, before = ShardReader(index), open_files()
    for id in [*range(12), 0, 11, 5, 0]:
        assert reader.read(id).image == png(image_of(id))
        assert open_files() - before <= 2
    reader.close()
    assert open_files() == before


def test_a_loader_knows_its_length_and_how_long_it_made_the_rank_wait(sound: ShardIndex, config: DataConfig) -> None:
    loader: Any = train_loader(plan_of(sound), split_of(sound, config), 2, range(2, 5))
    assert len(loader) == 6
    assert loader.wait_s == 0
    assert len(list(loader)) == 6
    waited = loader.wait_s
    assert waited > 0
    assert same(list(loader), list(loader))
    assert loader.wait_s > waited
