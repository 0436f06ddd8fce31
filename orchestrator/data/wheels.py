"""Region decoding from wheels alone: restart intervals joined in Python, simplejpeg, torch's antialiased resize."""

from __future__ import annotations

import numpy as np
import torch

from orchestrator.data.jpeg import JpegHeader, cut_window, end_early, parse_jpeg, parse_start
from orchestrator.data.kernel import DONE, OTHER, SHORT_READ, read_job
from orchestrator.data.transforms import Views, show
from orchestrator.options import Interpolation

HEADER_READ = 4096
MARGIN = 4
"""Pixels around a region that the upsampling filter of the chroma planes reaches."""


class WheelDecoder:
    """The interface of the kernel, an image at a time."""

    name = "simplejpeg and torch"

    def sizes(self, jobs: np.ndarray, max_pixels: int) -> None:
        """Fill in width and height of each job; 0 where the image must be decoded otherwise."""
        for job in jobs:
            header = parse_start(read_job(job, HEADER_READ)) or parse_start(read_job(job))
            fits = header is not None and header.width * header.height <= max_pixels
            job["width"], job["height"] = (header.width, header.height) if header and fits else (0, 0)

    def decode(self, jobs: np.ndarray, out: np.ndarray, cubic: bool) -> None:
        """Write each job with a width into its row of `out`, (n, 3, S, S) uint8, and set its status."""
        for job in jobs:
            if job["width"]:
                job["status"] = _decode(job, out, Interpolation.bicubic if cubic else Interpolation.bilinear)


def load_wheels() -> WheelDecoder | None:
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        return None
    return WheelDecoder()


def _decode(job: np.void, out: np.ndarray, interpolation: Interpolation) -> int:
    import simplejpeg

    data = read_job(job)
    header = parse_jpeg(data)
    if len(data) != job["size"]:
        return SHORT_READ
    if header is None:
        return OTHER
    box, side = job["box"].tolist(), out.shape[2]
    reach = _reach(box, bool(job["clip"]), side, interpolation, header)
    data, left, top = cut_window(data, header, reach) or (end_early(data, header, reach[3]), 0, 0)
    try:  # not strict: bytes behind an early end are no fault
        image = simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False, strict=False)
    except ValueError:
        return OTHER
    inside = box[0] - left, box[1] - top, box[2] - left, box[3] - top
    _resize(image, inside, job, out, interpolation)
    return DONE


def _reach(
    box: list[float], clip: bool, side: int, interpolation: Interpolation, header: JpegHeader
) -> tuple[int, int, int, int]:
    """Pixels that an output of `side` reads: the box, the margin, and beyond a box that does not clip the filter."""
    support = 0 if clip else 2 if interpolation is Interpolation.bicubic else 1
    x = MARGIN + support * max(1.0, (box[2] - box[0]) / side) + (not clip)
    y = MARGIN + support * max(1.0, (box[3] - box[1]) / side) + (not clip)
    left, top = max(0, int(box[0] - x)), max(0, int(box[1] - y))
    return left, top, min(header.width, int(box[2] + x + 1)), min(header.height, int(box[3] + y + 1))


def _resize(
    image: np.ndarray, box: tuple[float, ...], job: np.void, out: np.ndarray, interpolation: Interpolation
) -> None:
    row, side = int(job["row"]), out.shape[2]
    if not job["clip"]:  # a box between pixels: Pillow's arithmetic, at most one level from the kernel's
        views = Views(np.array([box]), np.array([bool(job["flip"])]), clip=False)
        out[row] = show(image, views, 0, side, interpolation)
        return
    left, top, right, bottom = map(int, box)
    pixels = torch.from_numpy(image)[top:bottom, left:right].permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(pixels, (side, side), mode=interpolation.name, antialias=True)[0]
    torch.from_numpy(out[row]).copy_(resized.flip(-1) if job["flip"] else resized)
