"""The samples of a set as its shards hold them, for what converts them; and the work on Pillow images or tensors."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def tars(folder: Path) -> list[str]:
    """The shards below a set's folder."""
    found = sorted(str(path) for path in (folder / "train").glob("*.tar"))
    assert found, f"{folder}: no shards"
    return found


def samples(data: Path) -> Iterator[tuple[str, bytes, int]]:
    """(key, bytes of the JPEG, label) of every sample of the set in `data`."""
    for path in tars(data / "plain"):
        with tarfile.open(path) as tar:
            held: dict[str, bytes] = {}
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                key, _, extension = member.name.rpartition(".")
                held[extension] = content.read()
                if len(held) == 2:
                    label = int(held.pop("cls"))
                    yield key, held.popitem()[1], label


def files(data: Path) -> list[tuple[Path, int]]:
    """(path, label) of every image of the set's class folders, written where they are not yet."""
    root = data / "folder"
    if not (root / "complete").exists():
        for key, image, label in samples(data):
            path = root / "train" / f"{label:04d}" / f"{key.replace('/', '-')}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        (root / "complete").touch()
    return sorted((path, int(path.parent.name)) for path in (root / "train").glob("*/*.jpg"))


def pil_work() -> Any:
    """torchvision's transform on Pillow images, up to uint8."""
    from torchvision.transforms import v2

    from tests.bench.loaders import SIDE

    return v2.Compose([v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def tensor_work() -> Any:
    """The same on decoded uint8 tensors."""
    from torchvision.transforms import v2

    from tests.bench.loaders import SIDE

    return v2.Compose([v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip()])


def decode_io(data: bytes) -> Any:
    """A JPEG as torchvision.io decodes it, (3, H, W) uint8."""
    import numpy as np
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)), ImageReadMode.RGB)


def one_thread(_worker: int = 0) -> None:
    import torch

    torch.set_num_threads(1)
