"""The plan as arithmetic: every sample once, steps and slices of almost equal size, the same for any world."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.order import EvalPlan, TrainPlan, cut, epoch_order, keyed_rng
from orchestrator.errors import EXIT_USER, ConfigError

ROOT = Path(__file__).parents[2]
PINNED_BATCHES = [[7, 11, 6], [16, 15, 9], [12, 8, 14, 10], [13, 1, 3], [2, 4, 0, 5]]
PINNED_DRAWS = [152, 597, 968, 155]


def sizes_of(pattern: str, shards: int) -> tuple[int, ...]:
    match pattern:
        case "rising":
            return tuple(range(1, shards + 1))
        case "one large":
            return (23, *(2 for _ in range(shards - 1)))
        case _:
            return tuple(7 * i % 5 + (i % 3 > 0) for i in range(1, shards + 1))  # some of them empty


PLANS = [
    TrainPlan(sizes_of(pattern, shards), 3, batch, window)
    for pattern, shards, batch, window in itertools.product(
        ("rising", "one large", "with gaps"), range(1, 10), (1, 2, 3, 5, 8, 64), (0, 1, 3)
    )
]
WORLDS = list(itertools.product(range(1, 5), range(1, 3)))


def slices(count: int, parts: int) -> list[range]:
    return [range(count)[cut(count, parts, part)] for part in range(parts)]


def parts_of(batch: np.ndarray, world: int, accumulate: int) -> list[list[np.ndarray]]:
    """By rank, then by part: what the stream hands out of a step."""
    mine = [batch[cut(len(batch), world, rank)] for rank in range(world)]
    return [[ids[cut(len(ids), accumulate, part)] for part in range(accumulate)] for ids in mine]


def epoch(plan: TrainPlan, number: int) -> list[np.ndarray]:
    first = number * plan.steps_per_epoch
    return [plan.batch(step) for step in range(first, first + plan.steps_per_epoch)]


@pytest.mark.parametrize(("count", "parts"), list(itertools.product(range(30), range(1, 9))))
def test_a_cut_is_contiguous_complete_and_even(count: int, parts: int) -> None:
    cuts = slices(count, parts)
    assert list(itertools.chain(*cuts)) == list(range(count))
    assert max(map(len, cuts)) - min(map(len, cuts)) <= 1


def test_every_sample_of_an_epoch_stands_in_exactly_one_step() -> None:
    for plan in PLANS:
        for number in (0, 1):
            ids = np.concatenate(epoch(plan, number))
            assert ids.dtype == np.int64
            assert sorted(ids) == list(range(sum(plan.shard_sizes)))


def test_steps_differ_by_one_sample_at_most_and_never_exceed_the_batch() -> None:
    for plan in PLANS:
        lengths = [len(batch) for batch in epoch(plan, 0)]
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) >= 1
        assert max(lengths) <= plan.global_batch_size
        fewest = -(-sum(plan.shard_sizes) // plan.global_batch_size)
        assert len(lengths) == plan.steps_per_epoch == fewest


def test_the_slices_of_the_ranks_join_to_the_same_global_batch_for_every_world() -> None:
    for plan in PLANS[::3]:
        for batch, (world, accumulate) in itertools.product(epoch(plan, 0)[:3], WORLDS):
            by_rank = parts_of(batch, world, accumulate)
            assert [len(parts) for parts in by_rank] == [accumulate] * world
            assert np.array_equal(np.concatenate([ids for parts in by_rank for ids in parts]), batch)
            shares = [sum(map(len, parts)) for parts in by_rank]
            assert max(shares) - min(shares) <= 1
            assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in by_rank)


@pytest.mark.parametrize(("world", "accumulate"), WORLDS)
def test_a_world_is_refused_exactly_when_some_part_of_some_step_would_be_empty(world: int, accumulate: int) -> None:
    for plan in PLANS[::3]:
        empty = any(
            len(ids) == 0 for batch in epoch(plan, 0) for parts in parts_of(batch, world, accumulate) for ids in parts
        )
        if not empty:
            plan.require_fits(world, accumulate)
            continue
        with pytest.raises(ConfigError) as caught:
            plan.require_fits(world, accumulate)
        assert caught.value.key == "recipe.global_batch_size"
        assert caught.value.exit_code == EXIT_USER
        offered = caught.value.way_out.partition("recipe.global_batch_size=")[2]
        assert bool(offered) == (plan.num_samples >= world * accumulate)
        if offered:
            mended = TrainPlan(plan.shard_sizes, 0, int(offered), 0)
            mended.require_fits(world, accumulate)
            one_less = TrainPlan(plan.shard_sizes, 0, int(offered) - 1, 0)
            with pytest.raises(ConfigError):
                one_less.require_fits(world, accumulate)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    sizes = (5, 1, 8, 3, 6)
    orders = [epoch_order(sizes, seed, number, 2).tolist() for seed in range(4) for number in range(4)]
    assert len(set(map(tuple, orders))) == len(orders)
    assert epoch_order(sizes, 1, 2, 2).tolist() != epoch_order(sizes, 2, 1, 2).tolist()
    assert epoch_order(sizes, 0, 0, 2).tolist() != list(range(23))


def test_steps_may_be_asked_for_in_any_order() -> None:
    plan = TrainPlan((5, 1, 8, 3), 1, 4, 2)
    once = [plan.batch(step).tolist() for step in range(3 * plan.steps_per_epoch)]
    fresh = TrainPlan((5, 1, 8, 3), 1, 4, 2)
    back = [fresh.batch(step).tolist() for step in reversed(range(3 * plan.steps_per_epoch))]
    assert back[::-1] == once


def test_the_order_is_pinned_and_the_same_in_a_fresh_process() -> None:
    """A change of these numbers changes what every run of everybody sees: resumes would mix two orders."""
    program = (
        "from orchestrator.data.order import TrainPlan, keyed_rng\n"
        "plan = TrainPlan((5, 1, 8, 3), 7, 4, 2)\n"
        "print([plan.batch(step).tolist() for step in range(2 * plan.steps_per_epoch)])\n"
        "print(keyed_rng(7, 1, 'x').integers(0, 1000, 4).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    plan = TrainPlan((5, 1, 8, 3), 7, 4, 2)
    batches = [plan.batch(step).tolist() for step in range(2 * plan.steps_per_epoch)]
    drawn = keyed_rng(7, 1, "x").integers(0, 1000, 4).tolist()
    assert done.stdout.splitlines() == [str(batches), str(drawn)]
    assert batches[:5] == PINNED_BATCHES
    assert drawn == PINNED_DRAWS


@pytest.mark.parametrize("window", [1, 2, 3, 7, 0])
def test_samples_stay_within_windows_of_shards_that_are_dealt_anew_each_epoch(window: int) -> None:
    sizes = (4, 6, 1, 3, 5, 2, 7)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    dealt = []
    for number in range(6):
        order = shard_of[epoch_order(sizes, 5, number, window)]
        first_seen = list(dict.fromkeys(order.tolist()))
        groups, start = [], 0
        while start < len(order):
            at, shards = start, set()
            while at < len(order) and len(shards | {order[at]}) <= (window or len(sizes)):
                shards.add(int(order[at]))
                at += 1
            length = sum(sizes[shard] for shard in shards)
            assert set(order[start : start + length].tolist()) == shards, "a window holds whole shards and only those"
            groups.append(frozenset(shards))
            start += length
        assert sorted(itertools.chain(*groups)) == list(range(len(sizes)))
        assert all(len(group) == (window or len(sizes)) for group in groups[:-1])
        dealt.append((tuple(groups), tuple(first_seen)))
    assert len({seen for _, seen in dealt}) > 1, "shards move from epoch to epoch"
    if 1 < window < len(sizes):
        assert len({groups for groups, _ in dealt}) > 1, "other shards meet in a window"


def test_samples_are_shuffled_within_a_shard_and_across_a_window() -> None:
    order = epoch_order((50, 50), 0, 0, 1)
    assert sorted(order[:50]) != order[:50].tolist()
    assert len({int(id) // 50 for id in order[:50]}) == 1
    mixed = epoch_order((50, 50), 0, 0, 2)[:50]
    assert 10 < sum(id < 50 for id in mixed) < 40


def test_every_place_of_the_order_is_equally_likely() -> None:
    counts = np.zeros((6, 6))
    for number in range(3000):
        counts[np.arange(6), epoch_order((1, 2, 3), 0, number, 0)] += 1
    assert np.abs(counts / 3000 - 1 / 6).max() < 0.03


@pytest.mark.parametrize("samples", range(1, 41))
def test_evaluation_meets_every_sample_once_in_equal_steps(samples: int) -> None:
    for batch, world in itertools.product((1, 2, 3, 7, 50), range(1, 6)):
        plan = EvalPlan(samples, batch, world)
        met = [plan.batch(step, rank) for step in range(plan.steps) for rank in range(world)]
        assert np.concatenate(met).tolist() == list(range(samples))
        assert all(len(ids) <= batch for ids in met)
        assert all(len(ids) == batch for ids in met[:-world]), "only the last step is not full"
        assert plan.steps == -(-samples // (batch * world))


def test_keys_give_streams_of_their_own() -> None:
    keys: list[tuple[int | str, ...]] = list(itertools.product(range(20), range(20), range(20), ("order", "augment")))
    keys += [
        (1, 23),
        (12, 3),
        (123,),
        ("1", 23),
        ("12", "3"),
        ("123",),
        (1, "23"),
        (-1, 23),
        (),
        ("",),
        ("", ""),
        ("a", "b"),
        ("astr:b",),
    ]
    draws = {keyed_rng(*key).bit_generator.random_raw() for key in keys}
    assert len(draws) == len(keys)


def test_equal_keys_give_equal_streams_and_numbers_are_uniform() -> None:
    assert np.array_equal(keyed_rng(1, "a").random(8), keyed_rng(1, "a").random(8))
    first = np.array([keyed_rng(0, epoch, id, "augment").random() for epoch in range(20) for id in range(200)])
    assert abs(first.mean() - 0.5) < 0.02
    assert np.abs(np.histogram(first, 10, (0, 1))[0] / len(first) - 0.1).max() < 0.02
