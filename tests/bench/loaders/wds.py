"""webdataset's own pipeline: as documented with Pillow, and with decoders that people put in its place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.bench.loaders import BATCH, SIDE, photos


def batches(data: Path, workers: int, decoder: str) -> Iterator[Any]:
    import webdataset as wds

    dataset = wds.WebDataset(photos.tars(data), shardshuffle=100, nodesplitter=wds.split_by_node).shuffle(1000)
    if decoder == "pil":
        dataset = dataset.decode("pil").to_tuple("jpg", "cls").map_tuple(photos.pil_work(), int)
    else:
        dataset = dataset.to_tuple("jpg", "cls").map_tuple(_decoders()[decoder], int)
    dataset = dataset.batched(BATCH, partial=False)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=photos.one_thread)
    for images, _ in loader:
        yield images


def _decoders() -> dict[str, Callable[[bytes], Any]]:
    work = photos.tensor_work()
    return {"io": lambda data: work(photos.decode_io(data)), "nvimgcodec": _decode_region}


@cache
def _region_decoder() -> Any:
    from nvidia import nvimgcodec

    backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
    return nvimgcodec.Decoder(device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, backends=backends, max_num_cpu_threads=1)


def _decode_region(data: bytes) -> Any:
    """The crop alone, then torch's antialiased resize of uint8 pixels."""
    import numpy as np
    import torch
    from nvidia import nvimgcodec
    from torch.nn.functional import interpolate
    from torchvision.transforms import v2

    stream = nvimgcodec.CodeStream(data)
    whole = torch.empty(3, stream.height, stream.width, device="meta")
    top, left, height, width = v2.RandomResizedCrop.get_params(whole, [0.08, 1.0], [3 / 4, 4 / 3])
    region = nvimgcodec.Region(top, left, top + height, left + width)
    image = _region_decoder().decode(stream.get_sub_code_stream(region=region))
    pixels = torch.from_numpy(np.asarray(image.cpu())).permute(2, 0, 1)[None]
    resized = interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)[0]
    return resized.flip(-1) if random.random() < 0.5 else resized
