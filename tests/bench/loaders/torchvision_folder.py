"""torchvision's ImageFolder under a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.loaders import BATCH, photos


def convert(data: Path, out: Path) -> None:
    assert out.name == "folder"
    photos.files(data)


def batches(data: Path, workers: int) -> Iterator[Any]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(data / "train"), photos.pil_work())
    loader = DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True, worker_init_fn=photos.one_thread
    )
    for images, _ in loader:
        yield images
