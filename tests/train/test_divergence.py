"""A rank whose weights are not the others' is found and named before anything of it is saved."""

from __future__ import annotations

import pytest
import torch
from launching import Cli, Saboteur, read_events
from torch import nn

from orchestrator.train import divergence
from orchestrator.train.divergence import Divergence, describe, find_divergence, hash_bits, replicated_tensors

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def flip_bit(tensor: torch.Tensor, element: int, bit: int = 0) -> None:
    raw = tensor.view(-1).view(torch.uint8)
    raw[element * tensor.element_size()] ^= 1 << bit


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 64, 1000, 2 * divergence.CPU_CHUNK + 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_flipped_bit_changes_the_hash(dtype: torch.dtype, size: int) -> None:
    tensor = (torch.arange(size) % 2).to(dtype)
    before = hash_bits(tensor).item()
    assert hash_bits(tensor.clone()).item() == before
    for element in {0, size // 2, size - 1}:
        changed = tensor.clone()
        flip_bit(changed, element)
        assert hash_bits(changed).item() != before


@pytest.mark.parametrize("bit", range(8))
def test_the_highest_bits_count_too(bit: int) -> None:
    tensor = torch.ones(1001)
    changed = tensor.clone()
    changed.view(torch.uint8)[4 * 500 + 3] ^= 1 << bit
    assert hash_bits(changed).item() != hash_bits(tensor).item()


def test_the_same_values_in_another_order_have_another_hash() -> None:
    tensor = torch.randn(3 * divergence.CPU_CHUNK, generator=torch.Generator().manual_seed(0))
    hashes = {hash_bits(tensor.roll(n)).item() for n in (0, 1, 2, 3, 2 * divergence.CPU_CHUNK)}
    assert len(hashes) == 5


def test_tensors_of_any_layout_and_address_can_be_hashed() -> None:
    base = torch.randn(4 * 3 * 5 * 5 + 1)
    odd_address = base[1:].view(4, 3, 5, 5)
    assert hash_bits(odd_address).item() == hash_bits(odd_address.clone()).item()
    last = odd_address.clone(memory_format=torch.channels_last)
    assert hash_bits(last).item() == hash_bits(last.permute(0, 2, 3, 1).contiguous()).item()
    assert hash_bits(torch.tensor(2.0)).item() != hash_bits(torch.tensor(1.0)).item()
    assert hash_bits(torch.zeros(0)).item() == 0
    assert hash_bits(base[::2]).item() == hash_bits(base[::2].clone()).item()


@pytest.mark.parametrize(
    ("table", "ranks", "tensors"),
    [
        ([[1, 2, 3]], None, ()),
        ([[1, 2, 3]] * 8, None, ()),
        ([[1, 2, 3], [1, 2, 4]], (0, 1), ("c",)),
        ([[1, 2, 3], [1, 9, 4], [1, 2, 3]], (1,), ("b", "c")),
        ([[5, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]], (0,), ("a",)),
        ([[1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 2, 4]], (0, 1, 2, 3), ("c",)),
        ([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 0, 3]], (3, 4), ("b", "c")),
    ],
)
def test_the_minority_is_named_or_everybody_where_there_is_none(
    table: list[list[int]], ranks: tuple[int, ...] | None, tensors: tuple[str, ...]
) -> None:
    expected = Divergence(ranks, tensors) if ranks else None
    assert find_divergence(table, ["a", "b", "c"]) == expected


def test_the_message_says_who_where_when_and_the_way_out() -> None:
    text = describe(Divergence((3,), ("fc.weight", "momentum_buffer of fc.weight")), 8, 200, 100)
    assert text.startswith(
        "rank 3 holds other weights than the other 7 ranks at step 200 (equal at step 100): fc.weight"
    )
    assert "Way out" in text
    assert describe(Divergence((0, 1), ("a",)), 2, 5, None).startswith(
        "ranks 0, 1 hold different weights at step 5 (not"
    )


def test_weights_moments_and_averages_are_compared_and_buffers_are_not() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    names = list(replicated_tensors(net, nn.Sequential(net), optimizer))
    assert names[0] == "0.weight"
    assert set(names[1:4]) == {"step of 0.weight", "exp_avg of 0.weight", "exp_avg_sq of 0.weight"}
    assert len(names) == 5
    assert not any("running" in name for name in names)


class TestRuns:
    """Two real processes."""

    @pytest.fixture
    def run(self, cli: Cli, small: tuple[str, ...]) -> tuple[str, ...]:
        return (*small, "model=timm", "model.name=saboteur", "checkpointing.every_steps=4", "--json")

    @pytest.mark.parametrize(("every", "flipped", "found"), [(1, 5, 5), (3, 5, 6), (100, 5, 7), (100, 2, 4)], ids=str)
    def test_a_flipped_bit_is_found_within_the_interval_or_before_a_save_and_the_run_restarts_clean(
        self, cli: Cli, run: tuple[str, ...], saboteur: Saboteur, every: int, flipped: int, found: int
    ) -> None:
        saboteur.arm("flip", 1, flipped)
        answer = cli("train", *run, f"compute.check_ranks_every_steps={every}", "cluster.max_restarts=0")
        assert saboteur.fired
        assert answer.code == 44, answer.err
        assert f"ranks 0, 1 hold different weights at step {found} " in answer.last_line()
        assert "head.weight differs first" in answer.last_line()
        assert answer.json()["state"] == "failed"
        (folder,) = (cli.cwd / "runs").iterdir()
        saved = [event["step"] for event in read_events(folder) if event["kind"] == "save"]
        assert all(step < flipped for step in saved)
        again = cli("train", *run, f"compute.check_ranks_every_steps={every}")
        assert again.code == 0, again.err

    def test_one_of_three_ranks_is_named_and_speaks_first(
        self, cli: Cli, run: tuple[str, ...], saboteur: Saboteur
    ) -> None:
        three = ("compute.num_processes=3", "compute.virtual_ranks=off", "compute.check_ranks_every_steps=1")
        saboteur.arm("flip", 2, 3)
        answer = cli("train", *run, *three, "cluster.max_restarts=0")
        assert saboteur.fired
        assert answer.code == 44, answer.err
        told = "error: rank 2: rank 2 holds other weights than the other 2 ranks at step 3 (equal at step 2)"
        assert answer.last_line().startswith(told)

    def test_ranks_that_compute_the_same_are_never_accused(self, cli: Cli, run: tuple[str, ...]) -> None:
        answer = cli("train", *run, "compute.check_ranks_every_steps=1", "recipe.ema_decay=0.9", "optimizer=adamw")
        assert answer.code == 0, answer.err

    def test_a_check_that_is_switched_off_finds_nothing(
        self, cli: Cli, run: tuple[str, ...], saboteur: Saboteur
    ) -> None:
        saboteur.arm("flip", 1, 5)
        answer = cli("train", *run, "compute.check_ranks_every_steps=0")
        assert saboteur.fired
        assert answer.code == 0, answer.err
