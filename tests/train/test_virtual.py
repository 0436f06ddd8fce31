"""The tree over virtual ranks: the same pairs meet for every number of processes, and what they send is a ring's."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_module import CLASSES, SIDE, make_batch
from torch import nn
from torch.utils.data import DataLoader

from orchestrator.compose import compose
from orchestrator.config import DataConfig
from orchestrator.data.order import TrainPlan
from orchestrator.data.stream import Split, _train_requests
from orchestrator.errors import EXIT_USER, ConfigError
from orchestrator.files import write_json
from orchestrator.model.module import Classifier, Span
from orchestrator.train.exchange import TreeExchange
from orchestrator.train.heartbeat import Heartbeat
from orchestrator.train.process import Rank
from orchestrator.train.slices import require_own_statistics
from orchestrator.train.trainer import build_trainer
from orchestrator.train.virtual import Choice, carry, choose, largest_world, levels, require_shareable, serving_worlds
from orchestrator.train.virtual_choice import slices_of
from orchestrator.world import ALONE

POWERS = [1, 2, 4, 8, 16, 32, 64]
PAIRS = [(virtual, world) for virtual, world in product(POWERS, POWERS) if world <= virtual]


@cache
def data_config() -> DataConfig:
    return compose([]).config.data


def meet(a: Any, b: Any) -> frozenset[Any]:
    """A sum that remembers who met whom, but not in which order."""
    return frozenset([a, b])


def tree(leaves: list[Any], add: Callable[[Any, Any], Any]) -> Any:
    """By the definition: neighbours, then pairs of neighbours, and so on."""
    while len(leaves) > 1:
        leaves = [add(a, b) for a, b in zip(leaves[::2], leaves[1::2], strict=True)]
    return leaves[0]


def carried(leaves: list[Any]) -> Any:
    waiting: list[tuple[int, Any]] = []
    for leaf in leaves:
        carry(waiting, leaf, meet)
    ((height, total),) = waiting
    assert 1 << height == len(leaves)
    return total


@pytest.mark.parametrize(("virtual", "world"), PAIRS)
def test_the_same_slices_meet_in_the_same_pairs_for_every_number_of_processes(virtual: int, world: int) -> None:
    count, share = 11, virtual // world
    wanted = tree(list(range(virtual)), meet)
    held = [[carried(list(range(p * share, (p + 1) * share)))] * count for p in range(world)]
    ways = [levels(count, p, world) for p in range(world)]
    for level in range(len(ways[0])):
        before = [list(row) for row in held]
        for p, way in enumerate(ways):
            peer, kept, sent = way[level]
            assert ways[peer][level] == (p, sent, kept)
            held[p][kept] = [meet(a, b) for a, b in zip(before[p][kept], before[peer][kept], strict=True)]
    for level in reversed(range(len(ways[0]))):
        before = [list(row) for row in held]
        for p, way in enumerate(ways):
            peer, _, sent = way[level]
            held[p][sent] = before[peer][sent]
    assert held == [[wanted] * count] * world


@pytest.mark.parametrize("slices", range(1, 65))
def test_the_sums_that_wait_are_as_many_as_the_slices_have_binary_ones(slices: int) -> None:
    waiting: list[tuple[int, Any]] = []
    for leaf in range(slices):
        carry(waiting, leaf, meet)
        assert len(waiting) == (leaf + 1).bit_count()
        assert [height for height, _ in waiting] == sorted({height for height, _ in waiting}, reverse=True)


@pytest.mark.parametrize("world", POWERS[1:])
def test_up_and_down_the_tree_takes_the_bytes_of_a_ring(world: int) -> None:
    count = 64 * 10
    for rank in range(world):
        way = levels(count, rank, world)
        sent = sum(sent.stop - sent.start + kept.stop - kept.start for _, kept, sent in way)
        assert sent == 2 * count * (world - 1) // world


@pytest.mark.parametrize(
    ("virtual", "low", "high", "places", "wanted"),
    [
        (8, 1, 8, 8, 8), (8, 1, 8, 7, 4), (8, 1, 8, 3, 2), (8, 1, 16, 16, 8), (8, 2, 8, 1, 0), (8, 3, 3, 8, 0),
        (8, 5, 7, 8, 0), (1, 1, 4, 4, 1), (1, 2, 4, 4, 0), (None, 1, 8, 7, 7), (None, 3, 8, 2, 0), (None, 2, 2, 9, 2),
        (8, 1, 8, 0, 0), (64, 1, 12, 12, 8),
    ],
)  # fmt: skip
def test_the_largest_world_that_has_its_places_and_serves(
    virtual: int | None, low: int, high: int, places: int, wanted: int
) -> None:
    assert largest_world(virtual, low, high, places) == wanted


def test_the_worlds_that_serve_are_the_powers_of_two_up_to_the_virtual_ranks() -> None:
    for virtual in POWERS:
        found = [world for world in range(1, 70) if largest_world(virtual, world, world, world)]
        assert found == serving_worlds(virtual) == [world for world in POWERS if world <= virtual]


@pytest.mark.parametrize(
    ("asked", "recorded", "world", "virtual", "warns"),
    [
        ("off", None, 4, None, False), ("off", Choice(4), 4, None, False), ("8", None, 8, 8, False),
        ("8", None, 1, 8, False), ("auto", None, 4, 4, False), ("auto", None, 1, 1, False),
        ("auto", None, 3, None, True), ("auto", Choice(4), 2, 4, False), ("auto", Choice(4), 4, 4, False),
        ("auto", Choice(4), 8, None, True), ("auto", Choice(4), 3, None, True), ("auto", Choice(None), 4, None, False),
    ],
)  # fmt: skip
def test_auto_keeps_to_the_first_attempt_and_says_when_it_cannot(
    asked: str, recorded: Choice | None, world: int, virtual: int | None, warns: bool
) -> None:
    choice = choose(asked, recorded, world)
    assert choice.virtual_ranks == virtual
    assert bool(choice.notice) == warns
    if choice.notice:
        assert f"{world} processes" in choice.notice
        assert "depend" in choice.notice


@pytest.mark.parametrize(("virtual", "world"), [(8, 3), (8, 16), (4, 8), (1, 2), (2, 6)])
def test_processes_that_cannot_share_a_number_asked_for_are_refused_with_those_that_can(
    virtual: int, world: int
) -> None:
    for refused in (
        lambda: choose(str(virtual), None, world), lambda: require_shareable(str(virtual), (world, world), world)
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            refused()
        assert (caught.value.key, caught.value.exit_code) == ("compute.virtual_ranks", EXIT_USER)
        assert f"{world} processes" in str(caught.value)
        for fitting in serving_worlds(virtual):
            assert str(fitting) in caught.value.way_out
            choose(str(virtual), None, fitting)


def test_a_range_of_processes_needs_one_that_serves_and_a_step_is_cut_into_the_virtual_ranks() -> None:
    assert require_shareable("8", (1, 6), 6) == 8
    assert require_shareable("8", None, 1) == 8
    assert require_shareable("auto", (1, 6), 6) == 6
    with pytest.raises(ConfigError, match="5 to 7 processes"):
        require_shareable("8", (5, 7), 7)


@pytest.mark.parametrize(("virtual", "world"), [pair for pair in PAIRS if pair[0] <= 8])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_parts_of_all_processes_are_those_of_as_many_processes_as_virtual_ranks(
    virtual: int, world: int, accumulate: int
) -> None:
    def places(world_size: int) -> list[tuple[int, int, int]]:
        spans = [Span(2, 9, 3, rank, world_size, virtual) for rank in range(world_size)]
        units = 3 * accumulate * virtual // world_size
        found = [span.place(unit, accumulate) for span in spans for unit in range(units)]
        assert all(at.ends_slice == (at.part == accumulate - 1) for at in found)
        return [(at.step, at.virtual_rank, at.part) for at in found]

    assert (
        sorted(places(world))
        == sorted(places(virtual))
        == list(product(range(2, 5), range(virtual), range(accumulate)))
    )


@pytest.mark.parametrize(("virtual", "world"), [pair for pair in PAIRS if pair[0] <= 8])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_process_reads_the_samples_of_its_virtual_ranks_slice_by_slice(
    virtual: int, world: int, accumulate: int
) -> None:
    plan = TrainPlan((40, 31, 40), 0, 30, 2)
    config: Any = data_config()

    def read(world_size: int, rank: int) -> list[list[int]]:
        split = Split(None, config, 0, 4, rank, world_size, virtual // world_size)  # pyright: ignore[reportArgumentType]
        return [request.ids.tolist() for request in _train_requests(plan, split, accumulate, range(2, 6))]

    whole = [read(virtual, v) for v in range(virtual)]
    share = virtual // world
    for rank in range(world):
        found, mine = read(world, rank), range(rank * share, (rank + 1) * share)
        step_by_step = [
            ids for step in range(4) for v in mine for ids in whole[v][step * accumulate : (step + 1) * accumulate]
        ]
        assert found == step_by_step


def test_statistics_over_all_ranks_are_refused_only_where_a_process_has_several_slices() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4))
    require_own_statistics(net, 1)
    require_own_statistics(nn.Sequential(nn.BatchNorm2d(4)), 4)
    with pytest.raises(ConfigError, match=r"SyncBatchNorm \(1\)"):
        require_own_statistics(net, 2)


COUNT = 1003
"""Numbers that no world divides evenly."""


def numbers_of(rank: int) -> torch.Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(rank))


def _exchange(folder: Path, world: int, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    exchange = TreeExchange(group, lambda parameters, gradients: None)
    summed, plain, few = numbers_of(rank), numbers_of(rank), torch.ones(1)
    exchange.sum(summed)
    sent = exchange.bytes_sent
    exchange.sum(few)  # fewer numbers than processes
    dist.all_reduce(plain)
    np.savez(folder / f"{rank}.npz", tree=summed.numpy(), plain=plain.numpy(), few=few.numpy(), sent=np.array(sent))
    dist.destroy_process_group()


def exchange_between(folder: Path, world: int) -> list[dict[str, np.ndarray]]:
    """Real processes, forked from this one."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=partial(_exchange, folder, world, rank)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_processes_sum_in_the_order_of_the_tree_and_send_as_much_as_a_ring(tmp_path: Path, world: int) -> None:
    found = exchange_between(tmp_path, world)
    wanted = tree([numbers_of(rank) for rank in range(world)], torch.add).numpy()
    for own in found:
        assert np.array_equal(own["tree"], wanted)
        assert own["few"].tolist() == [world]
    if world > 2:  # between two, it is an all-reduce
        ring = 2 * (world - 1) / world * COUNT * 4
        assert sum(int(own["sent"]) for own in found) == pytest.approx(world * ring, rel=0.01)
        # The control: a plain all-reduce adds in another order, so the test above can fail.
        assert not np.array_equal(found[0]["plain"], wanted)


def test_the_launcher_keeps_to_a_number_asked_for_or_to_what_the_run_has_noted(tmp_path: Path) -> None:
    for asked, wanted in (("8", 8), ("auto", None), ("off", None)):
        assert slices_of(asked, tmp_path) == wanted
    write_json(tmp_path / "virtual_ranks.json", {"schema": 1, "virtual_ranks": 4})
    for asked, wanted in (("8", 8), ("auto", 4), ("off", None)):
        assert slices_of(asked, tmp_path) == wanted


class Broken:
    """A group whose other process is gone, and a bucket of gradients."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def allreduce(self, *_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    def parameters(self) -> list[torch.Tensor]:
        return []

    gradients = parameters

    def buffer(self) -> torch.Tensor:
        return torch.ones(3)


def test_a_failed_exchange_ends_the_wait_for_it_and_is_told_once() -> None:
    broken: Any = Broken()
    exchange = TreeExchange(broken, lambda parameters, gradients: None)
    exchange.hook(broken).wait()
    exchange.hook(broken).wait()
    with pytest.raises(RuntimeError, match="closed by peer"):
        exchange.require_whole()
    exchange.require_whole()


class Counting(nn.Module):
    """Adds up in a buffer, which its output depends on, how many batches it has seen."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.head = nn.Linear(3 * SIDE**2, CLASSES)
        self.starts: list[float] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.starts.append(float(self.seen))
        self.seen += 1
        return self.head(images.flatten(1)) * (1 + self.seen)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*barebones.*")
@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_slice_starts_from_the_buffers_that_the_first_one_left_in_the_step_before(accumulate: int) -> None:
    virtual, steps = 4, 3
    net = Counting()
    config = compose(["recipe.warmup_epochs=0", f"recipe.accumulate={accumulate}", "compute.virtual_ranks=4"]).config
    module = Classifier(net, config, Span(0, steps, steps, 0, 1, virtual))
    rank = Rank(ALONE, torch.device("cpu"), 1, sys.stderr, None, Heartbeat())
    batches = [make_batch(range(3), 3 * virtual * accumulate) for _ in range(steps * virtual * accumulate)]
    build_trainer(module, rank, []).fit(module, train_dataloaders=DataLoader(batches, batch_size=None))  # pyright: ignore[reportArgumentType]
    of_a_slice = [[step * accumulate + part for part in range(accumulate)] for step in range(steps)]
    assert net.starts == [start for starts in of_a_slice for _ in range(virtual) for start in starts]
    assert net.seen == steps * accumulate
