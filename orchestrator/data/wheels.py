"""Region decoding from wheels alone: restart intervals joined in Python, simplejpeg, torch's antialiased resize."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from orchestrator.data.jpeg import JpegHeader, cut_window, end_early, has_end, parse_start
from orchestrator.data.kernel import DONE, OTHER, SHORT_READ, read_job
from orchestrator.data.transforms import Views, show
from orchestrator.options import Interpolation

MARGIN = 4
"""Pixels around a region that the upsampling filter of the chroma planes reaches."""


class WheelDecoder:
    """The interface of the kernel, an image at a time."""

    name = "simplejpeg and torch"

    def __init__(self):
        self._files: dict[tuple[int, int], tuple[bytes, JpegHeader]] = {}
        """By place, what `sizes` read and `decode` needs next."""

    def sizes(self, jobs: np.ndarray, max_pixels: int) -> None:
        """Fill in width and height of each job; 0 where the image must be decoded otherwise."""
        self._files.clear()
        for job in jobs:
            data = read_job(job)
            header = parse_start(data)
            if header is None or header.width * header.height > max_pixels:
                job["width"] = job["height"] = 0
            else:
                job["width"], job["height"] = header.width, header.height
                self._files[_place(job)] = data, header

    def decode(self, jobs: np.ndarray, out: np.ndarray, cubic: bool) -> None:
        """Write each job with a width into its row of `out`, (n, 3, S, S) uint8, and set its status."""
        interpolation = Interpolation.bicubic if cubic else Interpolation.bilinear
        for job in jobs:
            if job["width"]:
                data, header = self._files.get(_place(job)) or _read(job)
                job["status"] = _decode(data, header, job, out, interpolation)
        self._files.clear()


def _place(job: np.void) -> tuple[int, int]:
    return int(job["fd"]), int(job["offset"])


def _read(job: np.void) -> tuple[bytes, JpegHeader | None]:
    data = read_job(job)
    return data, parse_start(data)


def load_wheels() -> WheelDecoder | None:
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        return None
    return WheelDecoder()


def _decode(data: bytes, header: JpegHeader | None, job: np.void, out: np.ndarray, interpolation: Interpolation) -> int:
    if len(data) != job["size"]:
        return SHORT_READ
    if header is None or not has_end(data):
        return OTHER
    box, side = job["box"].tolist(), out.shape[2]
    reach = _reach(box, bool(job["clip"]), side, interpolation, header)
    k = _scale_of(job, side)
    if k > 1:
        scaled = _decode_scaled(data, header, k, reach, job)
        if scaled is None:
            return OTHER
        out[int(job["row"])] = _show_between(*scaled, job, side, interpolation)
        return DONE
    data, left, top = cut_window(data, header, reach) or (end_early(data, header, reach[3]), 0, 0)
    image = _decode_all(data)
    if image is None:
        return OTHER
    inside = box[0] - left, box[1] - top, box[2] - left, box[3] - top
    _resize(image, inside, job, out, interpolation)
    return DONE


def _decode_all(data: bytes, **scale: Any) -> np.ndarray | None:
    import simplejpeg

    try:  # not strict: bytes behind an early end are no fault
        return simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False, strict=False, **scale)
    except ValueError:
        return None


def _scale_of(job: np.void, side: int) -> int:
    """Greatest k of 1, 2, 4, 8 such that a DCT of 8 / k points still gives at least `side` pixels each way."""
    left, top, right, bottom = job["box"].tolist()
    k = 1
    while job["scaled"] and k < 8 and min(right - left, bottom - top) >= 2 * k * side:
        k *= 2
    return k


def _decode_scaled(
    data: bytes, header: JpegHeader, k: int, reach: tuple[int, int, int, int], job: np.void
) -> tuple[np.ndarray, np.ndarray] | None:
    """The region of a large box in an image that is smaller by `k`, and the box in it, in fractions of a pixel."""
    height = min(header.height, reach[3] + k * MARGIN) if header.baseline else header.height
    least = {"min_width": -(-header.width // k), "min_height": -(-height // k), "min_factor": k}
    image = _decode_all(end_early(data, header, height), **least)
    if image is None:
        return None
    inner = job["box"].astype(int).tolist() if job["clip"] else reach
    left, top = inner[0] // k, inner[1] // k
    region = image[top : -(-inner[3] // k), left : -(-inner[2] // k)]
    return region, job["box"] / k - np.array([left, top, left, top])


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
    if not job["clip"]:
        out[row] = _show_between(image, np.array(box), job, side, interpolation)
        return
    left, top, right, bottom = map(int, box)
    pixels = torch.from_numpy(image[top:bottom, left:right]).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(pixels, (side, side), mode=interpolation.name, antialias=True)[0]
    torch.from_numpy(out[row]).copy_(resized.flip(-1) if job["flip"] else resized)


def _show_between(
    image: np.ndarray, box: np.ndarray, job: np.void, side: int, interpolation: Interpolation
) -> np.ndarray:
    """A box between pixels: Pillow's arithmetic, at most one level from the kernel's."""
    views = Views(box[None], np.array([bool(job["flip"])]), clip=False)
    return show(image, views, 0, side, interpolation)
