"""Prediction on loose images, with the preprocessing that belongs to the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orchestrator.data.images import ImageError, decode_image
from orchestrator.data.transforms import eval_pixels
from orchestrator.errors import DataError
from orchestrator.model.module import Normalise
from orchestrator.train.loading import Loaded

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
BATCH = 32


class Guess(NamedTuple):
    """One class with the probability that the network gives it."""

    name: str
    probability: float


class Prediction(NamedTuple):
    """The most probable classes of one image, or why it could not be read."""

    path: Path
    guesses: list[Guess]
    error: str | None

    def as_json(self) -> dict[str, Any]:
        guesses = [{"class": guess.name, "probability": guess.probability} for guess in self.guesses]
        return {"path": str(self.path), "guesses": guesses, "error": self.error}


def find_images(places: Sequence[str]) -> list[Path]:
    """Files as named, and every image below each named folder. Raises DataError that lists what does not exist."""
    missing = [place for place in places if not Path(place).exists()]
    if missing:
        raise DataError(f"{', '.join(missing)}: no such file or folder. Way out: check the path")
    found: list[Path] = []
    for place in map(Path, places):
        inside = (
            sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES) if place.is_dir() else [place]
        )
        if not inside:
            raise DataError(
                f"{place}: the folder holds no image ({', '.join(sorted(SUFFIXES))}). Way out: name another"
            )
        found += inside
    return found


@torch.no_grad()
def predict(
    loaded: Loaded, paths: Sequence[Path], top: int, max_pixels: int, advance: Callable[[int], None]
) -> Iterator[Prediction]:
    """Predict in batches, in the order of `paths`; an unreadable image yields its error."""
    normalise = Normalise(list(loaded.preprocessing.mean), list(loaded.preprocessing.std), False)
    for first in range(0, len(paths), BATCH):
        chunk = paths[first : first + BATCH]
        images = [_read(path, loaded, max_pixels) for path in chunk]
        good = [image for image in images if isinstance(image, torch.Tensor)]
        rows = iter(_guess(loaded, normalise(torch.stack(good)), top) if good else [])
        for path, image in zip(chunk, images, strict=True):
            yield Prediction(path, [], image) if isinstance(image, str) else Prediction(path, next(rows), None)
        advance(len(chunk))


def _read(path: Path, loaded: Loaded, max_pixels: int) -> torch.Tensor | str:
    try:
        image, _ = decode_image(path.read_bytes(), max_pixels)
    except (ImageError, OSError) as error:
        return str(error)
    return torch.from_numpy(eval_pixels(image, loaded.preprocessing))


def _guess(loaded: Loaded, images: torch.Tensor, top: int) -> list[list[Guess]]:
    probabilities, classes = loaded.net(images).softmax(dim=1).topk(min(top, len(loaded.classes)), dim=1)
    return [
        [Guess(loaded.classes[c], p) for p, c in zip(row, columns, strict=True)]
        for row, columns in zip(probabilities.tolist(), classes.tolist(), strict=True)
    ]
