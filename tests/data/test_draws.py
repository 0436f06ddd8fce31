"""Keyed numbers: the published generator, and equal for a sample whatever it is drawn with and wherever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orchestrator.keyed import draws, philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(("counter", "key", "wanted"), [
    ([0, 0, 0, 0], 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([ONES] * 4, (ONES << 32) | ONES, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0x299F31D0 << 32) | 0xA4093822,
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
])  # fmt: skip
def test_numbers_are_the_known_answers_of_random123(counter: list[int], key: int, wanted: str) -> None:
    found = philox(np.array([counter], np.uint64), key)
    assert " ".join(f"{number:08x}" for number in found[0].tolist()) == wanted
    many = philox(np.array([[counter] * 3] * 2, np.uint64), key)
    assert (many == found[0]).all()
    assert many.shape == (2, 3, 4)


def some(
    ids: np.ndarray, copies: np.ndarray | None = None, key: tuple[int | str, ...] = (0, 1, "augment")
) -> np.ndarray:
    return draws(key, ids, np.zeros(len(ids), np.int64) if copies is None else copies, 11)


def test_a_samples_numbers_do_not_depend_on_the_batch_it_is_in() -> None:
    ids = np.random.default_rng(0).integers(0, 1 << 62, 200)
    copies = np.arange(200) % 3
    together = some(ids, copies)
    assert together.shape == (200, 11, 4)
    for rows in (np.arange(200)[::-1], np.array([7]), np.arange(0, 200, 13), np.array([5, 5, 5])):
        assert np.array_equal(some(ids[rows], copies[rows]), together[rows])
    assert np.array_equal(draws((0, 1, "augment"), ids, copies, 3), together[:, :3])
    assert some(np.array([], np.int64)).shape == (0, 11, 4)


def test_seed_epoch_purpose_id_and_copy_each_change_every_number() -> None:
    base = some(np.arange(50))
    others = [
        some(np.arange(50), key=(1, 1, "augment")),
        some(np.arange(50), key=(0, 2, "augment")),
        some(np.arange(50), key=(0, 1, "mix")),
        some(np.arange(50), key=("0", 1, "augment")),
        some(np.arange(50), key=(0, "1\0str:augment")),
        some(np.arange(50), np.ones(50, np.int64)),
        some(np.arange(50) + 50),
    ]
    for other in others:
        assert (base != other).mean() > 0.999
    everything = np.concatenate([base, *others]).reshape(-1, 4)
    assert len(np.unique(everything, axis=0)) == len(everything)


@pytest.mark.parametrize("id", [0, 1, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, (1 << 53) + 1, (1 << 63) - 1])
def test_ids_of_64_bits_are_told_apart(id: int) -> None:
    near = np.array([id, id ^ 1, id ^ (1 << 32), id ^ (1 << 62)], np.int64)
    assert len(np.unique(some(near).reshape(4, -1), axis=0)) == 4


def test_numbers_are_spread_evenly_and_alone_of_one_another() -> None:
    numbers = some(np.arange(20_000)).reshape(20_000, -1)
    assert 0 <= numbers.min() < 1e-5
    assert 1 - 1e-5 < numbers.max() < 1
    counts = np.stack([np.histogram(column, 32, (0, 1))[0] for column in numbers.T])
    chi2 = ((counts - 625.0) ** 2 / 625).sum(1)  # 31 degrees of freedom: mean 31, deviation 7.9
    assert abs(chi2.mean() - 31) < 4
    assert chi2.max() < 75
    apart = np.corrcoef(numbers.T) - np.eye(numbers.shape[1])
    assert np.abs(apart).max() < 0.035
    neighbours = [np.corrcoef(column[:-1], column[1:])[0, 1] for column in numbers.T]
    assert np.abs(neighbours).max() < 0.035


def test_fresh_processes_draw_the_same() -> None:
    code = (
        "import sys, numpy as np; from orchestrator.keyed import draws;"
        "sys.stdout.buffer.write(draws((3, 7, 'x'), np.arange(9) + 2**40, np.arange(9), 11).tobytes())"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    here = draws((3, 7, "x"), np.arange(9) + 2**40, np.arange(9), 11).tobytes()
    for seed in ("1", "2"):
        told = subprocess.check_output([sys.executable, "-c", code], env=environment | {"PYTHONHASHSEED": seed})
        assert told == here
