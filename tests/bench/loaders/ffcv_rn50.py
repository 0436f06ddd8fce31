"""FFCV in the format of its ResNet-50 recipe: sides of at most 500 pixels, half of the images raw, the rest at q90."""

from __future__ import annotations

from pathlib import Path

from tests.bench.loaders.ffcv_beton import batches, write

__all__ = ["batches", "convert"]


def convert(data: Path, out: Path) -> None:
    write(data, out, write_mode="proportion", compress_probability=0.5, max_resolution=500, jpeg_quality=90)
