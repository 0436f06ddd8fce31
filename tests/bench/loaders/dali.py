"""NVIDIA DALI on the CPU: its webdataset reader, its decoder of random crops, its resize."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.loaders import BATCH, SIDE, photos


def batches(data: Path, workers: int, antialias: str = "yes") -> Iterator[Any]:
    from nvidia.dali import fn, pipeline_def, types

    paths = photos.tars(data)
    indices = [str(Path(path).with_suffix(".idx")) for path in paths]

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> Any:
        images, _ = fn.readers.webdataset(
            paths=paths, index_paths=indices, ext=["jpg", "cls"], random_shuffle=True, initial_fill=1000, name="reader"
        )
        images = fn.decoders.image_random_crop(
            images, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(
            images, size=[SIDE, SIDE], interp_type=types.INTERP_LINEAR, antialias=bool(antialias), dtype=types.UINT8
        )
        return fn.flip(images, horizontal=fn.random.coin_flip())

    built = pipeline()
    built.build()
    while True:
        yield built.run()[0].as_array()
