"""A shuffle whose every place is computed on its own: nothing of the size of what is shuffled is ever held."""

from __future__ import annotations

import numpy as np

ROUNDS = 12
"""Measured: 8 suffice from about 100 elements up; 12 bring the odds of all orders of up to six within a tenth (rms)."""

_OF_ROUND, _OF_HALF = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03  # odd, and no small multiples of each other
_MULTIPLIERS = np.array([0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53], np.uint64)
_32 = np.uint64(32)


def shuffled(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where each place in range(size) goes under the permutation of range(size) that its key names: (n,) int64.

    places, sizes: (n,) int64 with 0 <= place < size < 2^40; keys: (n,) uint64.

    A Feistel network on a grid of about sqrt(size) x sqrt(size) cells, walking on from the fewer than sqrt(size) cells
    beyond the size (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    rows = np.ceil(np.sqrt(sizes)).astype(np.int64)
    columns = -(-sizes // rows)
    found = _network(places, rows, columns, keys)
    beyond = np.flatnonzero(found >= sizes)
    while len(beyond):
        found[beyond] = _network(found[beyond], rows[beyond], columns[beyond], keys[beyond])
        beyond = beyond[found[beyond] >= sizes[beyond]]
    return found


def _network(cells: np.ndarray, rows: np.ndarray, columns: np.ndarray, keys: np.ndarray) -> np.ndarray:
    row, column = np.divmod(cells, columns)
    for number in range(0, ROUNDS, 2):
        row = _moved(row, rows, column, keys, number)
        column = _moved(column, columns, row, keys, number + 1)
    return row * columns + column


def _moved(half: np.ndarray, bound: np.ndarray, other: np.ndarray, keys: np.ndarray, number: int) -> np.ndarray:
    """`half` + a keyed hash of the other half, modulo `bound`."""
    hashed = other.view(np.uint64) * np.uint64(_OF_HALF) + keys  # a bijection of `other`: distinct values stay distinct
    hashed += np.uint64((number + 1) * _OF_ROUND % 2**64)
    for multiplier in _MULTIPLIERS:  # the finaliser of MurmurHash3
        hashed ^= hashed >> _32
        hashed *= multiplier
    hashed >>= _32
    hashed *= bound.view(np.uint64)
    hashed >>= _32  # a number below `bound`, without a division
    moved = hashed.view(np.int64)
    moved += half
    moved -= bound * (moved >= bound)
    return moved
