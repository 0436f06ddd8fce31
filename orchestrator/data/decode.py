"""From encoded images to rows of a batch, by the fastest way that each image allows.

`fast` decodes the region of each crop: the compiled kernel, else wheels from PyPI; both come to the same pixels, those
of torch's antialiased resize. Whatever they leave (PNG, WebP, CMYK, turned or damaged images) and all of `exact` is
decoded whole and resized by Pillow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import numpy as np

from orchestrator.data.images import ImageError, decode_image
from orchestrator.data.kernel import DONE, JOB, SHORT_READ, load_kernel, read_job
from orchestrator.data.transforms import Views, show
from orchestrator.options import Decode, Interpolation

ViewsOf = Callable[[np.ndarray, np.ndarray], Views]
"""(rows (n,), sizes (n, 2) width and height) -> what is shown of each"""


class RegionDecoder(Protocol):
    """Decodes regions of JPEGs; works on arrays of `kernel.JOB`."""

    name: str

    def sizes(self, jobs: np.ndarray, max_pixels: int) -> None: ...

    def decode(self, jobs: np.ndarray, out: np.ndarray, cubic: bool) -> None: ...


@cache
def region_decoder() -> RegionDecoder | None:
    """The best that is installed: the compiled kernel, else wheels, else None."""
    kernel = load_kernel()
    if not isinstance(kernel, str):
        return kernel
    from orchestrator.data.wheels import load_wheels

    return load_wheels()


def decoder_notice(decode: Decode) -> str | None:
    """One line for who asked for fast decoding and does not get the fastest."""
    kernel = load_kernel()
    if decode is Decode.exact or not isinstance(kernel, str):
        return None
    found = region_decoder()
    return f"images are decoded by {found.name if found else 'Pillow'}: the compiled kernel is {kernel}"


def jobs_in_files(descriptors: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Jobs for images that lie in open files, row i of the batch for the i-th."""
    jobs = np.zeros(len(offsets), JOB)
    jobs["fd"], jobs["offset"], jobs["size"], jobs["row"] = descriptors, offsets, sizes, np.arange(len(offsets))
    return jobs


class BatchDecoder:
    """Fills batches; one per loader process."""

    def __init__(self, decode: Decode, interpolation: Interpolation, max_pixels: int):
        self._region = region_decoder() if decode is Decode.fast else None
        self._interpolation, self._max_pixels = interpolation, max_pixels

    def fill(self, jobs: np.ndarray, views_of: ViewsOf, out: np.ndarray) -> dict[int, str]:
        """Write each job's view into its row of `out`, (n, 3, S, S) uint8; returns why rows could not be decoded."""
        if self._region is None:
            left = jobs
        else:
            self._region.sizes(jobs, self._max_pixels)
            known = jobs["width"] > 0
            if known.any():
                self._fill_regions(jobs, known, views_of, out)
            left = jobs[~known | (jobs["status"] != DONE)]
        faults = {int(job["row"]): self._fill_exactly(job, views_of, out) for job in left}
        return {row: fault for row, fault in faults.items() if fault is not None}

    def _fill_regions(self, jobs: np.ndarray, known: np.ndarray, views_of: ViewsOf, out: np.ndarray) -> None:
        sizes = np.stack([jobs["width"], jobs["height"]], -1)
        views = views_of(jobs["row"][known], sizes[known])
        jobs["box"][known], jobs["flip"][known], jobs["clip"], jobs["scaled"] = *views[:2], views.clip, 1
        assert self._region is not None
        self._region.decode(jobs, out, self._interpolation is Interpolation.bicubic)

    def _fill_exactly(self, job: np.void, views_of: ViewsOf, out: np.ndarray) -> str | None:
        data, row = read_job(job), int(job["row"])
        if job["status"] == SHORT_READ or len(data) != job["size"]:
            return f"{len(data)} of {job['size']} bytes"
        try:
            image, _ = decode_image(data, self._max_pixels)
        except ImageError as error:
            return str(error)
        views = views_of(np.array([row]), np.array([[image.shape[1], image.shape[0]]]))
        out[row] = show(image, views, 0, out.shape[2], self._interpolation)
        return None
