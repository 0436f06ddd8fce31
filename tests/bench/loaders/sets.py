"""The sets of the benchmark: 4,096 JPEGs each as links, and the shards that this project packs of them.

`photos` are 1,000 real ImageNet photos, each four times and 96 a fifth time, so that no loader meets the end of an
epoch while it is measured; `synthetic` is drawn by a recipe, for machines without the photos.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
CACHE = ROOT / "bench" / "out" / "cache"
IMAGES = 4096
PER_SHARD = 256
DRAWN = 512
SIZES = ((500, 375), (500, 333), (375, 500), (500, 375), (640, 480), (333, 500), (500, 500), (1024, 768))
"""Width and height; photos of ImageNet have 500 x 375 pixels most often."""

SHARDS = {
    "plain": ("--no-crop-ready",),
    "crop_ready": (),
    "half": ("--short-side", "352", "--quality", "90"),
}
"""Folder of a set -> how `shards make` writes it."""


def photos_folder() -> Path | None:
    """The real photos, or None where this machine has none."""
    given = os.environ.get("ORCHESTRATOR_TEST_DATA")
    folder = (Path(given) if given else ROOT.parent / "shared" / "data") / "imagenet-sample"
    return folder.resolve() if folder.is_dir() else None


def available() -> dict[str, str | None]:
    """Set -> why it cannot be had, or None."""
    missing = None if photos_folder() else "no imagenet-sample in $ORCHESTRATOR_TEST_DATA or ../shared/data"
    reasons = {"photos": missing, "synthetic": None}
    chosen = os.environ.get("LOADERS_SETS", ",".join(reasons)).split(",")
    return {name: reason if name in chosen else "not in $LOADERS_SETS" for name, reason in reasons.items()}


def make(name: str) -> Path:
    """The folder of a set with its links and shards, made where it is not there yet."""
    data = CACHE / name
    if not (data / "source" / "complete").exists():
        shutil.rmtree(data, ignore_errors=True)
        _link(_photos() if name == "photos" else _synthetic(data / "drawn"), data / "source")
    for folder, options in SHARDS.items():
        _pack(data, folder, options)
    return data


def _pack(data: Path, folder: str, options: tuple[str, ...]) -> None:
    if (data / folder / "train" / "shards.json").exists():
        return
    command = [Path(sys.executable).parent / "orchestrator", "shards", "make", data / "source", data / folder]
    fixed = ["--val-fraction", "0", "--samples-per-shard", PER_SHARD]
    subprocess.run([str(part) for part in (*command, *fixed, *options)], check=True, capture_output=True)


def _link(images: list[tuple[str, Path]], source: Path) -> None:
    """`images` are (class, file); they are linked again and again until there are enough."""
    for number in range(IMAGES):
        category, path = images[number % len(images)]
        link = source / "train" / category / f"{number:05d}-{path.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    (source / "complete").touch()


def _photos() -> list[tuple[str, Path]]:
    folder = photos_folder()
    assert folder is not None
    return sorted((path.parent.name, path) for path in folder.glob("*/*"))


def _synthetic(folder: Path) -> list[tuple[str, Path]]:
    folder.mkdir(parents=True, exist_ok=True)
    return [(f"{number % 16:02d}", path.resolve()) for number, path in enumerate(_draw_all(folder))]


def _draw_all(folder: Path) -> Iterator[Path]:
    for number in range(DRAWN):
        path = folder / f"{number:04d}.jpg"
        draw(number, SIZES[number % len(SIZES)], path)
        yield path


def draw(seed: int, size: tuple[int, int], path: Path) -> None:
    """Coloured noise whose octaves fade like those of photos, as a JPEG of about 4 bits per pixel."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3), np.float32)
    for octave in range(9):
        grid = random.normal(size=(3 << octave, 3 << octave, 3)) * (1, 0.3, 0.3)
        for channel in range(3):
            fine = Image.fromarray(grid[..., channel].astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(fine) * 46 / 1.26**octave
    pixels = np.clip(total + 128, 0, 255).astype(np.uint8)
    Image.fromarray(pixels, "YCbCr").save(path, quality=93)
