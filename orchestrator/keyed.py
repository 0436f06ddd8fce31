"""Random numbers from keys: equal keys give equal numbers in every process, and no state needs to be carried along.

`keyed_rng` gives a generator for a purpose; `draws` gives numbers to all samples of a batch at once, by
Philox 4x32-10 of Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011). NumPy's own Philox gives one
stream per object, which costs as much per sample as the crop it is for.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

ROUNDS = 10
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def keyed_rng(*key: int | str) -> np.random.Generator:
    """A counter-based generator for a purpose: equal keys give equal numbers in every process."""
    return np.random.Generator(np.random.Philox(key=_digest(key, 16)))


def _digest(key: tuple[int | str, ...], size: int) -> int:
    text = "\0".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(blake2b(text.encode(), digest_size=size).digest(), "little")


def philox(counters: np.ndarray, key: int) -> np.ndarray:
    """Four numbers of 32 bits for each counter: (..., 4) uint64 below 2^32 -> the same shape; `key` has 64 bits."""
    c0, c1, c2, c3 = np.moveaxis(counters, -1, 0)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (second >> HALF) ^ c1 ^ np.uint64(k0), second & LOW
        c2, c3 = (first >> HALF) ^ c3 ^ np.uint64(k1), first & LOW
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def draws(key: tuple[int | str, ...], ids: np.ndarray, copies: np.ndarray, blocks: int) -> np.ndarray:
    """Numbers in [0, 1) of samples, (n, blocks, 4) float64: equal keys, ids and copies give equal numbers anywhere."""
    counters = np.empty((len(ids), blocks, 4), np.uint64)
    counters[:, :, 0] = (ids.astype(np.uint64) & LOW)[:, None]
    counters[:, :, 1] = (ids.astype(np.uint64) >> HALF)[:, None]
    counters[:, :, 2] = copies.astype(np.uint64)[:, None]
    counters[:, :, 3] = np.arange(blocks, dtype=np.uint64)
    return philox(counters, _digest(key, 8)) * 2.0**-32
