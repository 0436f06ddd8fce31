"""JPEGs of every kind, jobs for the region decoders, and what torch and Pillow make of the same boxes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from orchestrator.data.kernel import JOB, Kernel, load_kernel

SAMPLINGS = ("444", "422", "420", "Gray", "440", "411")
LIMIT = 1 << 28


def require_kernel() -> Kernel:
    kernel = load_kernel()
    assert isinstance(kernel, Kernel), kernel
    return kernel


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 with slopes, hard coloured edges and noise: every filter leaves its trace."""
    random = np.random.default_rng((width, height, seed))
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    slopes = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1)
    blocks = random.integers(0, 256, (height // 5 + 1, width // 7 + 1, 3)).repeat(5, 0).repeat(7, 1)
    mixed = slopes * 0.4 + blocks[:height, :width] * 0.5 + random.integers(0, 26, (height, width, 3))
    return mixed.clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, sampling: str = "420", quality: int = 85) -> bytes:
    if sampling == "Gray":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[..., :1]), quality, "GRAY", "Gray")
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", sampling)


def pillow_jpeg(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **({"quality": 85} | options))
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8, decoded whole."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def jobs_of(images: Sequence[bytes], boxes: Any = None, flips: Any = None, clip: bool = True) -> np.ndarray:
    """Jobs for images in memory, which the caller keeps; row i of the batch for the i-th."""
    jobs = np.zeros(len(images), JOB)
    jobs["fd"], jobs["clip"], jobs["row"] = -1, clip, np.arange(len(images))
    jobs["offset"] = [np.frombuffer(data, np.uint8).ctypes.data if data else 1 for data in images]
    jobs["size"] = [len(data) for data in images]
    if boxes is not None:
        jobs["box"] = boxes
    if flips is not None:
        jobs["flip"] = flips
    return jobs


def decode(decoder: Any, jobs: np.ndarray, side: int, cubic: bool = False) -> np.ndarray:
    """(n, 3, side, side) uint8; rows that were not decoded hold 77."""
    out = np.full((len(jobs), 3, side, side), 77, np.uint8)
    decoder.sizes(jobs, LIMIT)
    decoder.decode(jobs, out, cubic)
    return out


def by_torch(pixels: np.ndarray, box: Sequence[float], side: int, cubic: bool, flip: bool = False) -> np.ndarray:
    """(3, side, side) uint8: torch's antialiased resize of a box of whole pixels."""
    left, top, right, bottom = map(int, box)
    crop = torch.from_numpy(pixels[top:bottom, left:right].copy()).permute(2, 0, 1)[None]
    mode = "bicubic" if cubic else "bilinear"
    resized = torch.nn.functional.interpolate(crop, (side, side), mode=mode, antialias=True)[0].numpy()
    return resized[:, :, ::-1] if flip else resized


def edge_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The whole image, single pixels in its corners and centre, and strips along every edge."""
    w, h = width, height
    boxes = {
        (0, 0, w, h), (0, 0, 1, 1), (w - 1, 0, w, 1), (0, h - 1, 1, h), (w - 1, h - 1, w, h),
        (w // 2, h // 2, w // 2 + 1, h // 2 + 1), (0, 0, w, 1), (0, h - 1, w, h), (0, 0, 1, h), (w - 1, 0, w, h),
    }  # fmt: skip
    return sorted(boxes)


def random_boxes(width: int, height: int, count: int, seed: int = 0) -> list[tuple[int, int, int, int]]:
    random = np.random.default_rng((width, height, seed))
    x = np.sort(random.integers(0, width + 1, (count, 2)), 1)
    y = np.sort(random.integers(0, height + 1, (count, 2)), 1)
    return [
        (min(a, width - 1), min(b, height - 1), max(c, min(a, width - 1) + 1), max(d, min(b, height - 1) + 1))
        for (a, c), (b, d) in zip(x.tolist(), y.tolist(), strict=True)
    ]
