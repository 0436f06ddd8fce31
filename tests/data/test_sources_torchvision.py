"""torchvision's data sets by name: their own arguments and splits, and the files' own bytes."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.images import decode_image
from orchestrator.data.index import load_index
from orchestrator.data.sources import SourceOptions, open_source
from orchestrator.errors import DataError
from tests.data.test_writer import make, samples_of, save

TEXTURES = ("banded", "dotted", "woven")
MODELS = ("A320", "B747")


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    """DTD as it lies unpacked: per class two photos in each split of partition 1, other ones in partition 2."""
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    number = 0
    for partition in (1, 2):
        for split in ("train", "val", "test"):
            names = []
            for texture in TEXTURES:
                for _ in range(2):
                    names.append(f"{texture}/{texture}_{number:04d}.jpg")
                    save(base / "images" / names[-1], shade=number * 5)
                    number += 1
            (base / "labels" / f"{split}{partition}.txt").write_text("\n".join(names) + "\n")
    return tmp_path


@pytest.fixture
def aircraft(tmp_path: Path) -> Path:
    """FGVCAircraft with three splits of two photos for each model."""
    base = tmp_path / "fgvc-aircraft-2013b" / "data"
    base.mkdir(parents=True)
    for level, file in (("variant", "variants"), ("family", "families"), ("manufacturer", "manufacturers")):
        (base / f"{file}.txt").write_text("\n".join(MODELS) + "\n")
        for start, split in enumerate(("train", "val", "test", "trainval")):
            numbers = range(4 * (start % 3), 4 * (start % 3) + (8 if split == "trainval" else 4))
            lines = [f"{number:07d} {MODELS[number % 2]}" for number in numbers]
            (base / f"images_{level}_{split}.txt").write_text("\n".join(lines) + "\n")
    for number in range(12):
        save(base / "images" / f"{number:07d}.jpg", shade=number * 9)
    return tmp_path


def bytes_of(paths: list[Path]) -> Counter[bytes]:
    return Counter(path.read_bytes() for path in paths)


def test_photos_that_torchvision_would_decode_keep_their_bytes(textures: Path, tmp_path: Path) -> None:
    made = make("torchvision:DTD", tmp_path / "out", SourceOptions(root=str(textures)), workers=1, samples_per_shard=2)
    assert {split: sum(body["class_counts"]) for split, body in made["splits"].items()} == {"train": 6, "val": 6}
    assert load_index(str(tmp_path / "out/val")).classes == TEXTURES
    for split in ("train", "val"):
        listed = (textures / f"dtd/dtd/labels/{split}1.txt").read_text().split()
        expected = bytes_of([textures / "dtd/dtd/images" / name for name in listed])
        stored = samples_of(tmp_path / "out" / split)
        assert Counter(data for _, data in stored.values()) == expected
        assert {key: label for key, (label, _) in stored.items()} == {
            f"{split}/{i:07d}": TEXTURES.index(name.split("/")[0]) for i, name in enumerate(listed)
        }


def test_any_number_of_processes_writes_the_same_bytes_and_again_is_no_work(aircraft: Path, tmp_path: Path) -> None:
    spec, source = "torchvision:FGVCAircraft split=trainval,test", SourceOptions(root=str(aircraft))
    for workers in (1, 2):
        make(spec, tmp_path / f"out-{workers}", source, workers=workers, samples_per_shard=3)
    one, two = (
        {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*")}
        for out in (tmp_path / "out-1", tmp_path / "out-2")
    )
    assert one == two
    assert len([name for name in one if name.endswith(".tar")]) == 3 + 2
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out-2").rglob("*.tar")}
    make(spec, tmp_path / "out-2", source, workers=2, samples_per_shard=3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out-2").rglob("*.tar")} == times


def test_arguments_of_the_class_stand_behind_its_name(textures: Path) -> None:
    source = open_source(f"torchvision:DTD partition=2 root={textures}", SourceOptions(root="nowhere"))
    wanted = (textures / "dtd/dtd/labels/train2.txt").read_text().split()
    photos = [textures / "dtd/dtd/images" / name for name in wanted]
    assert [source.read(item.ref) for item in source.splits["train"]] == [path.read_bytes() for path in photos]
    assert [item.size for item in source.splits["train"]] == [path.stat().st_size for path in photos]


@pytest.mark.parametrize(
    ("words", "numbers"),
    [("", (4, 4)), (" split=trainval,test", (8, 4)), (" split=train,test annotation_level=family", (4, 4))],
)
def test_splits_are_the_ones_asked_for(aircraft: Path, words: str, numbers: tuple[int, int]) -> None:
    source = open_source(f"torchvision:FGVCAircraft{words}", SourceOptions(root=str(aircraft)))
    assert (len(source.splits["train"]), len(source.splits["val"])) == numbers
    read = {split: [source.read(item.ref) for item in items] for split, items in source.splits.items()}
    assert len({*read["train"], *read["val"]}) == sum(numbers)
    photos = sorted((aircraft / "fgvc-aircraft-2013b/data/images").iterdir())
    if "test" in words:
        assert read["val"] == [path.read_bytes() for path in photos[8:]]


def test_validation_is_cut_off_from_the_only_split_asked_for(aircraft: Path) -> None:
    source = open_source("torchvision:FGVCAircraft split=trainval", SourceOptions(root=str(aircraft)))
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 6, "val": 2}
    photos = sorted((aircraft / "fgvc-aircraft-2013b/data/images").iterdir())
    assert sorted(item.ref for items in source.splits.values() for item in items) == [str(p) for p in photos[:8]]


def test_an_argument_that_is_no_split_of_samples_keeps_both(tmp_path: Path) -> None:
    """EMNIST's `split` chooses the alphabet; `train` is an argument of the class that it extends."""
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, number in (("train", 6), ("test", 3)):
        pixels = np.arange(number * 4, dtype=np.uint8).reshape(number, 2, 2)
        labels = (np.arange(number) % 3 + 1).astype(np.uint8)
        (raw / f"emnist-letters-{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 2051, number, 2, 2) + pixels.tobytes()
        )
        (raw / f"emnist-letters-{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 2049, number) + labels.tobytes()
        )
    make("torchvision:EMNIST split=letters", tmp_path / "out", SourceOptions(root=str(tmp_path)))
    train, val = samples_of(tmp_path / "out/train"), samples_of(tmp_path / "out/val")
    assert (len(train), len(val)) == (6, 3)
    label, data = val["val/0000002"]
    assert (label, decode_image(data, 64)[0][..., 0].tolist()) == (3, [[8, 9], [10, 11]])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:DTD", r"not found.*Way out: --root FOLDER where it lies, or --download"),
        ("torchvision:DTD split", "split is not key=value"),
        ("torchvision:DTD colour=red", r"takes no colour=. Way out: partition, root, split"),
        ("torchvision:DTD loader=os", "takes no loader="),
        ("torchvision:FGVCAircraft split=tset", r"tset.*Way out: mend its arguments"),
        ("torchvision:FGVCAircraft split=train,tset", r"tset.*Way out"),
        ("torchvision:DTDs", "did you mean 'DTD'"),
        ("torchvision:", "no such data set"),
        ("torchvision:wrap_dataset_for_transforms_v2", "no such data set"),
        ("torchvision:CocoDetection annFile=x", r"Way out"),
    ],
)
def test_a_wrong_name_argument_or_place_is_the_users_to_mend(aircraft: Path, spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(spec, SourceOptions(root=str(aircraft)))


def test_nothing_is_downloaded_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets.mnist as mnist

    asked: list[str] = []

    def refuse(*_: object, **__: object) -> None:
        asked.append("download")
        raise RuntimeError("no network")

    monkeypatch.setattr(mnist, "download_and_extract_archive", refuse)
    monkeypatch.setattr(mnist, "_flip_byte_order", lambda tensor: tensor)
    with pytest.raises(DataError, match="not found"):
        open_source("torchvision:KMNIST", SourceOptions(root=str(tmp_path)))
    assert asked == []
    with pytest.raises(DataError, match=r"no network|Error downloading"):
        open_source("torchvision:KMNIST", SourceOptions(root=str(tmp_path), download=True))
    assert asked


def test_a_photo_that_vanished_is_listed_with_all_others(textures: Path, tmp_path: Path) -> None:
    photos = sorted((textures / "dtd/dtd/images").rglob("*.jpg"))
    photos[0].unlink()
    photos[1].write_bytes(photos[1].read_bytes()[:200])
    with pytest.raises(DataError, match=r"2 images cannot be used(.|\n)*No such file"):
        make("torchvision:DTD", tmp_path / "out", SourceOptions(root=str(textures)))
    assert not (tmp_path / "out/train").exists()
