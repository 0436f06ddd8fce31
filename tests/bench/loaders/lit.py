"""litdata: its optimised chunks, which keep the bytes of JPEGs, and its streaming loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.loaders import BATCH, photos


def _read(item: tuple[str, int]) -> dict[str, Any]:
    from PIL import Image

    return {"image": Image.open(item[0]), "label": item[1]}


def convert(data: Path, out: Path) -> None:
    """Chunks of the usual 64 MB; smaller ones for object stores, where litdata reads the whole of a chunk that two
    workers share for every image of it."""
    import litdata

    size = "16MB" if out.name == "litdata_16mb" else "64MB"
    inputs = [(str(path), label) for path, label in photos.files(data)]
    litdata.optimize(fn=_read, inputs=inputs, output_dir=str(out), num_workers=1, chunk_bytes=size)


def loader_of(place: str, workers: int, cache: str | None = None) -> Any:
    import litdata

    work = photos.tensor_work()

    class Photos(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            image = sample["image"]
            return work(image if image.shape[0] == 3 else image.expand(3, -1, -1)), sample["label"]

    dataset = Photos(place, cache_dir=cache, shuffle=True, drop_last=True)
    return litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)


def batches(data: Path, workers: int) -> Iterator[Any]:
    for images, _ in loader_of(str(data), workers):
        yield images
