"""mosaicml-streaming: MDS shards, with the documented column of JPEGs (Pillow) or a column of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.loaders import BATCH, photos


def convert(data: Path, out: Path) -> None:
    from PIL import Image
    from streaming import MDSWriter

    raw = out.name == "mds_bytes"
    columns = {"image": "bytes" if raw else "jpeg", "label": "int"}
    with MDSWriter(out=str(out), columns=columns, size_limit=1 << 26) as writer:
        for path, label in photos.files(data):
            content = path.read_bytes() if raw else Image.open(path)
            writer.write({"image": content, "label": label})


def loader_of(place: str, workers: int, decoder: str, cache: str | None = None) -> Any:
    import streaming

    pil, tensor = photos.pil_work(), photos.tensor_work()

    class Photos(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            image = sample["image"]
            if decoder == "io":
                return tensor(photos.decode_io(image)), sample["label"]
            return pil(image.convert("RGB")), sample["label"]

    streaming.base.util.clean_stale_shared_memory()
    remote = place if cache else None
    dataset = Photos(remote=remote, local=cache or place, shuffle=True, batch_size=BATCH)
    return streaming.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=workers, drop_last=True, worker_init_fn=_start_worker
    )


def _start_worker(worker: int) -> None:
    """Give a forked worker an S3 client of its own: on the connection that it inherits, answers to others arrive."""
    from torch.utils.data import get_worker_info

    photos.one_thread()
    info: Any = get_worker_info()
    for stream in info.dataset.streams:
        if stream.remote:
            stream._downloader.clean_up()


def batches(data: Path, workers: int, decoder: str = "pil") -> Iterator[Any]:
    for images, _ in loader_of(str(data), workers, decoder):
        yield images
