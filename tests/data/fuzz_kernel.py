"""Throws damaged JPEGs at a kernel: `python fuzz_kernel.py SEED COUNT [KERNEL.so]`; prints how many were decoded."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
from jpegs import SAMPLINGS, edge_boxes, jobs_of, jpeg, picture, pillow_jpeg, random_boxes, require_kernel

from orchestrator.data.kernel import DONE, Kernel, _libjpegs

MOST_PIXELS = 1 << 20


def open_kernel(path: str) -> Kernel:
    library = ctypes.CDLL(path)
    assert any(library.kernel_open(place.encode()) == 0 for place in _libjpegs())
    return Kernel(library)


def sources(kernel: Kernel) -> list[bytes]:
    plain = [jpeg(picture(97 + i, 61 + 9 * i), sampling) for i, sampling in enumerate(SAMPLINGS)]
    ready = [kernel.rewrite(data, 1) or data for data in plain]
    progressive = [pillow_jpeg(picture(80, 50), progressive=True, subsampling=i) for i in range(3)]
    return plain + ready + progressive


def mutate(data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """Bits turned, bytes overwritten, cut, doubled or spliced; headers as often as compressed data."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 6)):
        end = min(len(changed), 700) if random.integers(2) else len(changed)
        at = int(random.integers(0, max(1, end)))
        length = int(random.integers(1, 40))
        match int(random.integers(6)):
            case 0:
                changed[at : at + 1] = bytes([changed[at] ^ 1 << random.integers(8)]) if changed else b""
            case 1:
                changed[at : at + length] = random.bytes(length)
            case 2:
                del changed[at : at + length]
            case 3:
                del changed[max(4, at) :]
            case 4:
                start = int(random.integers(len(other)))
                changed[at:at] = other[start : start + length]
            case _:
                changed[at : at + 2] = random.choice([b"\xff\xd9", b"\xff\xd0", b"\xff\xff", b"\x00\x00", b"\xff\xda"])
    return bytes(changed) + (b"\xff\xd9" if random.integers(2) else b"")


def main(seed: int, count: int, kernel: Kernel) -> None:
    random, kinds = np.random.default_rng(seed), sources(kernel)
    decoded = rewritten = 0
    for _ in range(count):
        pick = random.integers(len(kinds), size=2)
        data = mutate(kinds[pick[0]], kinds[pick[1]], random)
        jobs = jobs_of([data] * 8)
        kernel.sizes(jobs, MOST_PIXELS)
        width, height = int(jobs["width"][0]), int(jobs["height"][0])
        assert width * height <= MOST_PIXELS
        if width:
            boxes = [*edge_boxes(width, height), *random_boxes(width, height, 8, int(pick[0]))]
            jobs["box"] = random.permutation(np.array(boxes, float))[:8]
            jobs["flip"], jobs["scaled"], jobs["clip"] = random.integers(0, 2, (3, 8))
            out = np.zeros((8, 3, *[int(random.choice([1, 7, 32, 57]))] * 2), np.uint8)
            kernel.decode(jobs, out, bool(random.integers(2)))
            decoded += bool((jobs["status"] == DONE).any())
        facts = kernel.describe(data)
        if facts and facts.width * facts.height <= MOST_PIXELS:
            rewritten += kernel.rewrite(data, int(random.integers(1, 9))) is not None
    print(decoded, rewritten)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), open_kernel(sys.argv[3]) if len(sys.argv) > 3 else require_kernel())
