"""The compiled decoder: a batch of JPEGs in one call, outside Python's lock.

It is built at installation, with the machine's C compiler or the one of a wheel, and uses the libjpeg-turbo that
Pillow's wheel carries.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orchestrator.data.native.build import kernel_path

DONE, OTHER, SHORT_READ = 0, 1, 2
REFUSALS = (None, "cannot be loaded", "lacks a function", "has other structures")

JOB = np.dtype(
    [
        ("offset", "<i8"),
        ("size", "<i8"),
        ("box", "<f8", (4,)),
        ("fd", "<i4"),
        ("flip", "<i4"),
        ("clip", "<i4"),
        ("scaled", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("status", "<i4"),
        ("row", "<i4"),
    ]
)
"""One image of a batch, as `Job` in kernel.c: where its bytes are, which box it shows, what came of it."""


def read_job(job: np.void) -> bytes:
    """The encoded bytes of a job; fewer than its size where the file ends before."""
    size = int(job["size"])
    if job["fd"] < 0:
        return ctypes.string_at(int(job["offset"]), size)
    return os.pread(int(job["fd"]), size, int(job["offset"]))


class JpegFacts(NamedTuple):
    """What a plain JPEG says about itself; the MCU's sides in pixels, the restart interval in MCUs (0 = none)."""

    width: int
    height: int
    mcu_width: int
    mcu_height: int
    interval: int
    baseline: bool

    @property
    def columns(self) -> int:
        """MCUs in a row."""
        return -(-self.width // self.mcu_width)


class Kernel:
    """The functions of the compiled library."""

    name = "the compiled kernel"

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        pointer, number = ctypes.c_void_p, ctypes.c_int
        library.kernel_sizes.argtypes = [pointer, number, ctypes.c_int64]
        library.kernel_sizes.restype = None
        library.kernel_decode.argtypes = [pointer, number, number, number, pointer]
        library.kernel_decode.restype = None
        library.kernel_crop_ready.argtypes = [ctypes.c_char_p, ctypes.c_int64, number, ctypes.POINTER(pointer)]
        library.kernel_crop_ready.restype = ctypes.c_int64
        library.kernel_free.argtypes = [pointer]
        library.kernel_free.restype = None
        library.kernel_describe.argtypes = [ctypes.c_char_p, ctypes.c_int64, pointer]

    def sizes(self, jobs: np.ndarray, max_pixels: int) -> None:
        """Fill in width and height of each job; 0 where the image must be decoded otherwise."""
        self._library.kernel_sizes(jobs.ctypes.data, len(jobs), max_pixels)

    def decode(self, jobs: np.ndarray, out: np.ndarray, cubic: bool) -> None:
        """Write each job with a width into its row of `out`, (n, 3, S, S) uint8, and set its status."""
        assert out.flags.c_contiguous
        assert out.dtype == np.uint8
        self._library.kernel_decode(jobs.ctypes.data, len(jobs), out.shape[2], int(cubic), out.ctypes.data)

    def describe(self, data: bytes) -> JpegFacts | None:
        """What a JPEG says about itself; None where the kernel leaves it to others."""
        facts = (ctypes.c_int32 * 6)()
        if not self._library.kernel_describe(data, len(data), facts):
            return None
        return JpegFacts(*facts[:5], baseline=bool(facts[5]))

    def rewrite(self, data: bytes, interval: int) -> bytes | None:
        """The same coefficients with a restart marker every `interval` MCUs, proved equal; None where impossible."""
        result = ctypes.c_void_p()
        length = self._library.kernel_crop_ready(data, len(data), interval, ctypes.byref(result))
        if not length:
            return None
        try:
            return ctypes.string_at(result, length)
        finally:
            self._library.kernel_free(result)


@cache
def load_kernel() -> Kernel | str:
    """The kernel, or why there is none. `ORCHESTRATOR_KERNEL=off` does without it."""
    if os.environ.get("ORCHESTRATOR_KERNEL") == "off":
        return "switched off by ORCHESTRATOR_KERNEL=off"
    path = kernel_path()
    if not path.exists():
        return "not built (no C compiler at installation, nor one from PyPI; `make install` tries again)"
    library = ctypes.CDLL(str(path))
    if library.kernel_job_size() != JOB.itemsize:
        return f"{path.name} has another layout of jobs"
    refusals = []
    for place in _libjpegs():
        refusal = REFUSALS[library.kernel_open(place.encode())]
        if refusal is None:
            return Kernel(library)
        refusals.append(f"{place} {refusal}")
    return f"no libjpeg-turbo with interface 6.2 ({'; '.join(refusals)})"


def _libjpegs() -> Iterator[str]:
    """Pillow's own copy, then the system's."""
    import PIL

    site = Path(PIL.__file__).parents[1]
    yield from sorted(str(path) for path in site.glob("pillow.libs/libjpeg-*.so.62*"))
    yield "libjpeg.so.62"
