"""The plan as arithmetic: every sample once, steps and slices of almost equal size, the same for any world."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.bijection import shuffled
from orchestrator.data.order import Draws, EvalPlan, TrainPlan, automatic_lanes, cut, keyed_rng
from orchestrator.errors import EXIT_USER, ConfigError

ROOT = Path(__file__).parents[2]
PINNED_BATCHES = [[2, 5, 10], [4, 13, 11], [6, 0, 12, 8], [7, 15, 16], [1, 3, 14, 9]]
PINNED_SHUFFLE = [42036, 19148, 8275, 73183]
PINNED_DRAWS = [152, 597, 968, 155]


def sizes_of(pattern: str, shards: int) -> tuple[int, ...]:
    match pattern:
        case "rising":
            return tuple(range(1, shards + 1))
        case "one large":
            return (23, *(2 for _ in range(shards - 1)))
        case _:
            return tuple(7 * i % 5 + (i % 3 > 0) for i in range(1, shards + 1))  # some of them empty


def plans_of(pattern: str, shards: int, batch: int, window: int, repeats: int) -> Iterator[TrainPlan]:
    """With all lanes that are not refused."""
    sizes = sizes_of(pattern, shards)
    most = min(sum(size > 0 for size in sizes), sum(sizes) // -(-sum(sizes) // batch))
    for lanes in sorted({0, 1, min(2, most), min(5, most), most}):
        yield TrainPlan(sizes, 3, batch, window, lanes, repeats)


GRID = list(itertools.product(("rising", "one large", "with gaps"), range(1, 10), (1, 2, 3, 8, 64), (0, 1, 3), (1, 3)))
PLANS = [plan for point in GRID for plan in plans_of(*point)]
WORLDS = list(itertools.product((1, 2, 3, 5, 8), (1, 2)))


def slices(count: int, parts: int) -> list[range]:
    return [range(count)[cut(count, parts, part)] for part in range(parts)]


def parts_of(batch: np.ndarray, world: int, accumulate: int) -> list[list[np.ndarray]]:
    """By rank, then by part: what the stream hands out of a step."""
    mine = [batch[cut(len(batch), world, rank)] for rank in range(world)]
    return [[ids[cut(len(ids), accumulate, part)] for part in range(accumulate)] for ids in mine]


def whole_epoch(plan: TrainPlan, number: int) -> Draws:
    return plan.rank_draws(range(number * plan.steps_per_epoch, (number + 1) * plan.steps_per_epoch), 1, 0)


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
        for number in (0, 1) if plan.repeats == 1 else ():
            ids = np.concatenate(epoch(plan, number))
            assert ids.dtype == np.int64
            assert np.array_equal(np.sort(ids), np.arange(sum(plan.shard_sizes)))


def test_a_round_of_repeats_draws_every_sample_so_often_with_other_copies_and_as_many_an_epoch() -> None:
    for plan in PLANS[::2]:
        epochs = [whole_epoch(plan, number) for number in range(plan.repeats, 2 * plan.repeats)]
        assert [len(draws.ids) for draws in epochs] == [plan.num_samples] * plan.repeats
        met = [(int(id), int(copy)) for draws in epochs for id, copy in zip(*draws, strict=True)]
        assert sorted(met) == list(itertools.product(range(plan.num_samples), range(plan.repeats)))
        ends = [set(draws.ids.tolist()) for draws in epochs]
        for earlier, later in itertools.combinations(ends, 2):
            assert len(earlier & later) <= plan.lane_count, (
                "only a lane's sample at the border of two epochs is in both"
            )


def test_the_copies_of_a_sample_mostly_meet_in_one_step() -> None:
    plan = TrainPlan((100,) * 64, 0, 128, 4, repeats=4)
    assert plan.lane_count == 8
    batches = [plan.draws(step) for step in range(plan.steps_per_epoch)]
    whole = sum(np.count_nonzero(np.unique(draws.ids, return_counts=True)[1] == 4) for draws in batches)
    assert whole > 0.9 * plan.num_samples / 4
    assert all(len(np.unique(draws.ids)) < len(draws.ids) / 3 for draws in batches)


def test_steps_differ_by_one_sample_at_most_and_never_exceed_the_batch() -> None:
    for plan in PLANS[::3]:
        lengths = [len(batch) for batch in epoch(plan, 0)]
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) >= 1
        assert max(lengths) <= plan.global_batch_size
        fewest = -(-sum(plan.shard_sizes) // plan.global_batch_size)
        assert len(lengths) == plan.steps_per_epoch == fewest


def test_the_slices_of_the_ranks_join_to_the_same_global_batch_for_every_world() -> None:
    for plan in PLANS[::7]:
        for batch, (world, accumulate) in itertools.product(epoch(plan, 0)[:3], WORLDS):
            by_rank = parts_of(batch, world, accumulate)
            assert [len(parts) for parts in by_rank] == [accumulate] * world
            assert np.array_equal(np.concatenate([ids for parts in by_rank for ids in parts]), batch)
            shares = [sum(map(len, parts)) for parts in by_rank]
            assert max(shares) - min(shares) <= 1
            assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in by_rank)


@pytest.mark.parametrize(("world", "accumulate"), WORLDS)
def test_a_world_is_refused_exactly_when_some_part_of_some_step_would_be_empty(world: int, accumulate: int) -> None:
    for plan in PLANS[::7]:
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


def test_a_rank_computes_its_own_slice_of_any_steps_as_if_it_had_cut_the_whole_batch() -> None:
    for plan in PLANS[::31]:
        steps = 2 * plan.steps_per_epoch
        whole = [plan.draws(step) for step in range(steps)]
        for world, some in itertools.product((1, 2, 3, 5), (range(steps), range(1, steps, 3), range(steps - 1, steps))):
            for rank in range(world):
                mine = plan.rank_draws(some, world, rank)
                cuts = [cut(len(whole[step].ids), world, rank) for step in some]
                for found, wanted in zip(mine, zip(*whole, strict=True), strict=True):
                    parts = [wanted[step][own] for step, own in zip(some, cuts, strict=True)]
                    assert np.array_equal(found, np.concatenate([*parts, np.zeros(0)]))
        assert [plan.step_size(step) for step in range(steps)] == [len(draws.ids) for draws in whole]
        assert len(plan.rank_draws(range(0), 2, 1).ids) == 0


def test_long_ranges_are_computed_in_pieces_without_a_trace() -> None:
    plan = TrainPlan((70_000, 90_000), 1, 1000, 0)
    assert np.array_equal(whole_epoch(plan, 1).ids, np.concatenate(epoch(plan, 1)))


def dealt(plan: TrainPlan, turn: int) -> list[int]:
    """The order of the shards: by a random number each."""
    tickets = keyed_rng(plan.seed, turn, "shards").bit_generator.random_raw(len(plan.shard_sizes))
    return sorted(range(len(tickets)), key=lambda shard: int(tickets[shard]) % 2**32)


def slow_epoch(plan: TrainPlan, number: int) -> list[list[int]]:
    """The same order as its description reads: everything laid out in full."""
    starts = np.cumsum([0, *plan.shard_sizes])
    turn, part = divmod(number, plan.repeats)
    line = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in dealt(plan, turn)])
    keys = keyed_rng(plan.seed, turn, "blocks").integers(0, 2**64, (plan.lane_count, plan.blocks), np.uint64)
    sizes = [plan.step_size(step) for step in range(plan.steps_per_epoch)]
    shares = [[len(range(size)[cut(size, plan.lane_count, lane)]) for size in sizes] for lane in range(plan.lane_count)]
    queues, first = [], 0
    for lane, share in enumerate(shares):
        own = line[first : first + sum(share)]
        first += sum(share)
        mixed = []
        for block in range(plan.blocks):
            ids = own[cut(len(own), plan.blocks, block)]
            size, key = np.full(len(ids), len(ids)), np.full(len(ids), keys[lane, block])
            mixed += ids[shuffled(np.arange(len(ids)), size, key)].tolist()
        drawn = np.repeat(mixed, plan.repeats)
        queues.append(iter(drawn[part * len(own) : (part + 1) * len(own)].tolist()))
    return [
        [id for queue, share in zip(queues, shares, strict=True) for id in itertools.islice(queue, share[step])]
        for step in range(plan.steps_per_epoch)
    ]


def test_every_place_computed_on_its_own_is_that_of_the_order_laid_out_in_full() -> None:
    for plan in PLANS[::11]:
        for number in (0, plan.repeats, 2 * plan.repeats - 1):
            assert [ids.tolist() for ids in epoch(plan, number)] == slow_epoch(plan, number)


def test_every_step_takes_the_same_number_from_each_lane() -> None:
    for plan in PLANS[::11]:
        lane_of = np.empty(plan.num_samples, int)
        for batch in epoch(plan, 0):
            for lane in range(plan.lane_count):
                lane_of[batch[cut(len(batch), plan.lane_count, lane)]] = lane
        if plan.repeats == 1:
            starts = np.cumsum([0, *plan.shard_sizes])
            line = np.concatenate([lane_of[starts[shard] : starts[shard + 1]] for shard in dealt(plan, 0)])
            assert np.array_equal(line, np.sort(line)), "a lane is one stretch of the shards as they are dealt"
            shares = np.bincount(line, minlength=plan.lane_count)
            assert max(shares) - min(shares) <= plan.steps_per_epoch


@pytest.mark.parametrize(("lanes", "world"), [(8, 8), (8, 4), (8, 2), (8, 16), (6, 3), (4, 8), (8, 3), (5, 8)])
@pytest.mark.parametrize("batch", [32, 47])
def test_a_rank_reads_whole_lanes_where_it_can(lanes: int, world: int, batch: int) -> None:
    sizes = tuple(20 + i % 7 for i in range(64))
    plan = TrainPlan(sizes, 1, batch, 2, lanes)
    read = [
        set(plan.shards_of(plan.rank_draws(range(plan.steps_per_epoch), world, rank).ids).tolist())
        for rank in range(world)
    ]
    assert set().union(*read) == set(range(64))
    total = sum(map(len, read))
    if lanes % world == 0:
        assert total <= len(sizes) + world - 1, "only the shard at the border of two ranks is read by both"
    elif world % lanes == 0:
        assert total <= (len(sizes) + lanes - 1) * (world // lanes)
    else:
        assert total <= (len(sizes) + lanes - 1) * (world // lanes + 2)
    at_once = [
        len(set(plan.shards_of(plan.rank_draws(range(step, step + 1), world, 0).ids)))
        for step in range(plan.steps_per_epoch)
    ]
    assert sorted(at_once)[len(at_once) // 2] <= plan.shards_at_once(world) <= len(sizes)


@pytest.mark.parametrize(("world", "lanes"), [(1, 8), (2, 4), (8, 1), (16, 1), (64, 1), (3, 4), (5, 3), (12, 2)])
def test_the_shards_a_rank_reads_at_once_are_those_of_the_lanes_its_slice_can_meet(world: int, lanes: int) -> None:
    plan = TrainPlan((100,) * 256, 0, 800, 4, 8)
    assert plan.shards_at_once(world) == lanes * 5, "a block of 4 shards' length meets 5"
    of_lane = [slices(800, 8).index(next(part for part in slices(800, 8) if slot in part)) for slot in range(800)]
    met = [len({of_lane[slot] for slot in part}) for part in slices(800, world)]
    assert max(met) <= lanes


def test_lanes_chosen_for_a_set_serve_one_rank_and_thousands() -> None:
    imagenet = automatic_lanes(1281, 1024, 16, 1)
    assert imagenet == 16
    assert automatic_lanes(100_000, 32_768, 16, 1) == 128
    assert automatic_lanes(100_000, 1024, 16, 4) == 64, "at least four samples of each lane in a step, copies together"
    assert [automatic_lanes(shards, 256, 16, 1) for shards in (1, 20, 31, 32, 100)] == [1, 1, 1, 2, 4]
    assert automatic_lanes(5000, 256, 0, 1) == 1, "window 0: all is shuffled with all"
    assert automatic_lanes(5000, 1, 1, 1) == 1
    for plan in PLANS:
        assert TrainPlan(plan.shard_sizes, 0, plan.global_batch_size, plan.window).lane_count >= 1


@pytest.mark.parametrize(("sizes", "batch", "most"), [((5, 0, 9, 3), 64, 3), ((5, 9, 3, 8, 8), 3, 3), ((9,) * 9, 7, 6)])
def test_lanes_that_cannot_be_filled_are_refused_with_the_most_that_can(
    sizes: tuple[int, ...], batch: int, most: int
) -> None:
    assert TrainPlan(sizes, 0, batch, 1, most).lane_count == most
    with pytest.raises(ConfigError, match=r"data\.lanes = ") as caught:
        TrainPlan(sizes, 0, batch, 1, most + 1)
    assert (caught.value.key, caught.value.exit_code) == ("data.lanes", EXIT_USER)
    assert f"at most data.lanes={most}, or" in caught.value.way_out


def order_of(sizes: tuple[int, ...], seed: int, number: int, window: int, lanes: int = 1) -> np.ndarray:
    return whole_epoch(TrainPlan(sizes, seed, 5, window, lanes), number).ids


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    sizes = (5, 1, 8, 3, 6)
    orders = [order_of(sizes, seed, number, 2, 2).tolist() for seed in range(4) for number in range(4)]
    assert len(set(map(tuple, orders))) == len(orders)
    assert order_of(sizes, 1, 2, 2).tolist() != order_of(sizes, 2, 1, 2).tolist()
    assert order_of(sizes, 0, 0, 2).tolist() != list(range(23))


@pytest.mark.parametrize("lanes", [1, 4])
def test_consecutive_epochs_are_unrelated_and_shards_move_between_ranks(lanes: int) -> None:
    sizes, world = (100,) * 40, 4
    plan = TrainPlan(sizes, 1, 50, 4, lanes)
    places = [np.argsort(whole_epoch(plan, number).ids) for number in range(11)]
    related = [np.corrcoef(earlier, later)[0, 1] for earlier, later in itertools.pairwise(places)]
    assert abs(np.mean(related)) < 0.15, "40 shards: a mean of 10 correlations strays by about 0.05"
    whose: list[set[int]] = [set() for _ in sizes]
    for number, rank in itertools.product(range(10), range(world)):
        steps = range(number * plan.steps_per_epoch, (number + 1) * plan.steps_per_epoch)
        for shard in set(plan.shards_of(plan.rank_draws(steps, world, rank).ids).tolist()):
            whose[shard].add(rank)
    assert all(len(ranks) > 1 for ranks in whose)


def test_steps_may_be_asked_for_in_any_order() -> None:
    plan = TrainPlan((5, 1, 8, 3), 1, 4, 2, 2, 2)
    once = [plan.batch(step).tolist() for step in range(4 * plan.steps_per_epoch)]
    fresh = TrainPlan((5, 1, 8, 3), 1, 4, 2, 2, 2)
    back = [fresh.batch(step).tolist() for step in reversed(range(4 * plan.steps_per_epoch))]
    assert back[::-1] == once


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_the_order_is_pinned_and_the_same_in_a_fresh_process(hash_seed: str) -> None:
    """A change of these numbers changes what every run of everybody sees: resumes would mix two orders."""
    program = (
        "from orchestrator.data.order import TrainPlan, keyed_rng\n"
        "plan = TrainPlan((5, 1, 8, 3), 7, 4, 2, 2)\n"
        "print([plan.batch(step).tolist() for step in range(2 * plan.steps_per_epoch)])\n"
        "print(keyed_rng(7, 1, 'x').integers(0, 1000, 4).tolist())"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    plan = TrainPlan((5, 1, 8, 3), 7, 4, 2, 2)
    batches = [plan.batch(step).tolist() for step in range(2 * plan.steps_per_epoch)]
    drawn = keyed_rng(7, 1, "x").integers(0, 1000, 4).tolist()
    assert done.stdout.splitlines() == [str(batches), str(drawn)]
    assert batches[:5] == PINNED_BATCHES
    assert drawn == PINNED_DRAWS


@pytest.mark.parametrize(("window", "blocks"), [(1, 12), (2, 6), (3, 4), (5, 2), (8, 2), (9, 1), (12, 1), (0, 1)])
def test_samples_stay_within_blocks_of_about_a_window_of_shards_that_are_dealt_anew(window: int, blocks: int) -> None:
    sizes = (10,) * 12
    plan = TrainPlan(sizes, 5, 6, window, 1)
    assert plan.blocks == blocks
    seen = []
    for number in range(6):
        shards = plan.shards_of(whole_epoch(plan, number).ids)
        groups = [frozenset(shards[cut(len(shards), blocks, block)].tolist()) for block in range(blocks)]
        assert [len(group) for group in groups] == [12 // blocks] * blocks
        seen.append((tuple(groups), tuple(dict.fromkeys(shards.tolist()))))
    assert len({shards for _, shards in seen}) > 1, "shards move from epoch to epoch"
    if 1 < blocks < len(sizes):
        assert len({groups for groups, _ in seen}) > 1, "other shards meet in a block"


def test_samples_are_shuffled_within_a_shard_and_across_a_window() -> None:
    order = order_of((50, 50), 0, 0, 1)
    assert sorted(order[:50]) != order[:50].tolist()
    assert len({int(id) // 50 for id in order[:50]}) == 1
    mixed = order_of((50, 50), 0, 0, 2)[:50]
    assert 10 < sum(id < 50 for id in mixed) < 40


def test_every_place_of_the_order_is_equally_likely() -> None:
    counts = np.zeros((6, 6))
    plan = TrainPlan((1, 2, 3), 0, 2, 0)
    for number in range(3000):
        counts[np.arange(6), whole_epoch(plan, number).ids] += 1
    assert np.abs(counts / 3000 - 1 / 6).max() < 0.03


@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_neighbours_in_a_shard_are_as_far_apart_as_the_blocks_allow(lanes: int) -> None:
    """In a perfect shuffle of N two samples share a batch with probability B / N, and are 0.293 x N apart (median)."""
    plan = TrainPlan((500,) * 256, 2, 256, 16, lanes)
    order = whole_epoch(plan, 0).ids
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    within = np.arange(len(order) - 1) % 500 != 499
    apart = np.abs(np.diff(place))[within]
    step = place * plan.steps_per_epoch // len(order)
    together = np.mean(np.diff(step)[within] == 0)
    assert plan.blocks == 16 // lanes
    assert together < 1.1 * plan.blocks * 256 / len(order)
    assert np.median(apart) > 0.28 * len(order) / plan.blocks
    assert np.mean(apart < 5) < 0.01


def test_a_step_mixes_many_shards() -> None:
    plan = TrainPlan((500,) * 256, 2, 256, 16)
    assert plan.lane_count == 8
    mixed = [len(np.unique(plan.shards_of(plan.batch(step)))) for step in range(0, plan.steps_per_epoch, 20)]
    assert np.mean(mixed) > 100, "8 lanes x 16 shards; a perfect shuffle meets 162 of 256"


def test_a_plan_of_a_thousand_million_samples_stays_small() -> None:
    """4,096 ranks x 8 loader processes: nothing may be as long as the set, an epoch or, for a rank, a step."""
    sizes = tuple((8000 + np.arange(100_000) * 7919 % 4001).tolist())
    tracemalloc.start()
    try:
        plan = TrainPlan(sizes, 0, 32_768, 16, 4096)
        assert plan.num_samples > 999_000_000
        assert len(plan.rank_draws(range(plan.steps_per_epoch), 4096, 1234).ids) > 240_000
        of_a_rank = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        worker = range(5 * plan.steps_per_epoch + 3, 6 * plan.steps_per_epoch, 8)
        assert len(plan.rank_draws(worker, 4096, 4095).ids) > 30_000
        assert len(plan.draws(7 * plan.steps_per_epoch // 2).ids) > 32_000, "one rank that serves 4,096 lanes"
        of_the_rest = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(of_a_rank, of_the_rest) < 50e6
    assert plan.shards_at_once(4096) < 20


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9, 10, 97, 1000, 4096, 4097])
def test_a_keyed_shuffle_is_a_permutation(size: int) -> None:
    keys = np.repeat(keyed_rng(size).integers(0, 2**64, 50, np.uint64), size)
    places = np.tile(np.arange(size), 50)
    orders = shuffled(places, np.full(len(places), size), keys).reshape(50, size)
    assert np.array_equal(np.sort(orders), np.tile(np.arange(size), (50, 1)))
    assert size < 9 or len(np.unique(orders, axis=0)) == 50


def test_the_keyed_shuffle_is_pinned() -> None:
    places, size, key = np.array([0, 1, 79_999, 159_999]), np.full(4, 160_000), np.full(4, 2**63 + 7, np.uint64)
    assert shuffled(places, size, key).tolist() == PINNED_SHUFFLE


def test_a_place_is_shuffled_alike_alone_and_among_others() -> None:
    rng = keyed_rng("among")
    sizes = rng.integers(1, 10**6, 500)
    places, keys = rng.integers(0, sizes), rng.integers(0, 2**64, 500, np.uint64)
    alone = [shuffled(places[i : i + 1], sizes[i : i + 1], keys[i : i + 1])[0] for i in range(500)]
    assert shuffled(places, sizes, keys).tolist() == alone


@pytest.mark.parametrize(("size", "shuffles"), [(5, 20_000), (24, 8000), (100, 4000), (1000, 400)])
def test_keyed_shuffles_look_like_those_of_numpy(size: int, shuffles: int) -> None:
    """Where an element goes, how far from the next one, how often nothing moves, and how neighbouring keys differ."""
    keys = np.repeat(np.arange(shuffles, dtype=np.uint64), size)
    places = np.tile(np.arange(size), shuffles)
    orders = shuffled(places, np.full(len(places), size), keys).reshape(shuffles, size)
    at = np.stack([np.bincount(orders[:, i] * 5 // size, minlength=5) for i in range(0, size, -(-size // 20))])
    expected = np.bincount(np.arange(size) * 5 // size, minlength=5) * shuffles / size
    assert surprise(at, expected, 4 * len(at)) < 5
    steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % size).ravel(), minlength=size)[1:]
    assert surprise(steps, steps.sum() / (size - 1), size - 2) < 5
    assert abs(np.mean(orders == np.arange(size)) * size - 1) < 5 / shuffles**0.5
    assert abs(np.mean(orders[1:] == orders[:-1]) * size - 1) < 5 / shuffles**0.5


@pytest.mark.parametrize(("size", "orders"), [(2, 2), (3, 6), (4, 24)])
def test_all_orders_of_a_few_are_equally_likely(size: int, orders: int) -> None:
    keys = np.repeat(np.arange(60_000, dtype=np.uint64), size)
    shuffles = shuffled(np.tile(np.arange(size), 60_000), np.full(len(keys), size), keys).reshape(-1, size)
    counts = np.unique(shuffles, axis=0, return_counts=True)[1]
    assert len(counts) == orders
    assert surprise(counts, 60_000 / orders, orders - 1) < 5


def test_the_shard_of_a_sample_is_found_among_empty_ones() -> None:
    sizes = (0, 2, 0, 0, 3, 1, 0)
    assert TrainPlan(sizes, 0, 2, 0).shards_of(np.arange(6)).tolist() == [1, 1, 4, 4, 4, 5]


def surprise(counts: np.ndarray, expected: np.ndarray | float, freedom: int) -> float:
    """Standard deviations of a chi-square statistic above its mean."""
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


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
