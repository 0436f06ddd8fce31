"""FFCV: its own file with the same JPEG bytes, its compiled pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.loaders import BATCH, SIDE, photos


class _Images:
    """A data set whose samples are (decoded image, label); FFCV's field encodes JPEGs itself."""

    def __init__(self, files: list[tuple[Path, int]]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Any:
        from PIL import Image

        path, label = self._files[number]
        return Image.open(path).convert("RGB"), label


def convert(data: Path, out: Path) -> None:
    """Quality 95: FFCV has no way to keep the bytes of a JPEG."""
    write(data, out, write_mode="jpg", jpeg_quality=95)


def write(data: Path, out: Path, **how: Any) -> None:
    """Images as FFCV's field stores them when told `how`."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    out.mkdir(parents=True, exist_ok=True)
    fields = {"image": RGBImageField(**how), "label": IntField()}
    DatasetWriter(str(out / "train.beton"), fields, num_workers=1).from_indexed_dataset(_Images(photos.files(data)))


def batches(data: Path, workers: int) -> Iterator[Any]:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    pipelines = {
        "image": [RandomResizedCropRGBImageDecoder((SIDE, SIDE)), RandomHorizontalFlip(), ToTensor()],
        "label": [IntDecoder(), ToTensor()],
    }
    order = OrderOption.RANDOM
    loader = Loader(
        str(data / "train.beton"), BATCH, workers, os_cache=True, order=order, drop_last=True, pipelines=pipelines
    )
    for images, _ in loader:
        yield images
