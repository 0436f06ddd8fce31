"""Loaders that the lock brings read crop-ready shards: restart markers in the files, the same pixels in the batch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from timm.data import create_dataset

from orchestrator.data.crop_ready import is_available
from orchestrator.data.index import load_index
from orchestrator.data.plan import MakeOptions
from orchestrator.data.sources import SourceOptions
from orchestrator.data.writer import make_shards
from tests.data.test_writer import samples_of

pytestmark = [
    pytest.mark.skipif(not is_available(), reason="no compiled kernel here"),
    pytest.mark.filterwarnings("ignore"),
]

NUMBER, CLASSES = 24, 3
RESTART = b"\xff\xd1"


def photo(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (90, 150, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of four shards, crop-ready."""
    root = tmp_path_factory.mktemp("ready")
    for number in range(NUMBER):
        path = root / "photos" / "abc"[number % CLASSES] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(number)).save(path, quality=80)
    options = MakeOptions(samples_per_shard=6, workers=1)
    source = SourceOptions(val_fraction=0)
    make_shards(str(root / "photos"), root / "out", source, options, lambda *_: nullcontext(lambda _: None))
    return root / "out/train"


def originals(folder: Path) -> list[tuple[int, bytes]]:
    """Label and pixels of each photo as Pillow reads the files that were packed, in any order."""
    photos = sorted(folder.parents[1].glob("photos/*/*.jpg"))
    return sorted(("abc".index(path.parent.name), np.asarray(Image.open(path)).tobytes()) for path in photos)


def tars(folder: Path) -> list[str]:
    return [shard.location for shard in load_index(str(folder)).shards]


def by_timm(folder: Path) -> Iterator[tuple[Any, int]]:
    """timm's reader takes a pattern with the number of samples behind it, in place of its `_info.json`."""
    last = len(tars(folder)) - 1
    yield from create_dataset("wds/", root=str(folder), split=f"train-{{000000..{last:06d}}}.tar|{NUMBER}")


def by_webdataset(folder: Path) -> Iterator[tuple[Any, int]]:
    yield from wds.WebDataset(tars(folder), shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls")


def by_torchvision(folder: Path) -> Iterator[tuple[Any, int]]:
    import torch
    from torchvision.io import decode_jpeg

    for fields in wds.WebDataset(tars(folder), shardshuffle=False):
        pixels = decode_jpeg(torch.frombuffer(bytearray(fields["jpg"]), dtype=torch.uint8))
        yield pixels.permute(1, 2, 0).contiguous().numpy(), int(fields["cls"])


def test_the_files_have_restart_markers(ready: Path):
    stored = [data for _, data in samples_of(ready).values()]
    assert len(stored) == NUMBER
    assert all(RESTART in data and Image.open(io.BytesIO(data)).size == (150, 90) for data in stored)
    assert not any(RESTART in path.read_bytes() for path in ready.parents[1].glob("photos/*/*.jpg"))


@pytest.mark.parametrize("read", [by_timm, by_webdataset], ids=["timm", "webdataset"])
def test_they_give_the_pixels_of_the_photos_that_were_packed(ready: Path, read: Any):
    found = sorted((label, np.asarray(pixels).tobytes()) for pixels, label in read(ready))
    assert found == originals(ready)


def test_torchvision_decodes_them_to_the_pixels_of_the_photos(ready: Path):
    """Its libjpeg may differ from Pillow's in a rounding: it decodes the photos themselves for comparison."""
    from torchvision.io import decode_image

    photos = sorted(ready.parents[1].glob("photos/*/*.jpg"))
    plain = [("abc".index(p.parent.name), decode_image(str(p)).permute(1, 2, 0).contiguous()) for p in photos]
    expected = sorted((label, pixels.numpy().tobytes()) for label, pixels in plain)
    assert sorted((label, pixels.tobytes()) for pixels, label in by_torchvision(ready)) == expected
