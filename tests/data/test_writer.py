"""Sources become shard sets: the right samples, the right bytes, and every bad image named."""

from __future__ import annotations

import gc
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from orchestrator.data.crop_ready import is_available
from orchestrator.data.images import decode_image
from orchestrator.data.index import load_index, load_members
from orchestrator.data.plan import MakeOptions, make_keys, plan_split
from orchestrator.data.shardset import bucket_sizes
from orchestrator.data.sources import Item, SourceOptions, open_source, split_by_hash
from orchestrator.data.writer import make_shards, plan_shards
from orchestrator.errors import ConfigError, DataError, UserError

LIMIT = 1_000_000

needs_kernel = pytest.mark.skipif(not is_available(), reason="no compiled kernel here")


def quiet(description: str, total: int, unit: str) -> Any:
    return nullcontext(lambda n: None)


def make(spec: str | Path, out: Path, source: SourceOptions | None = None, **options: Any) -> dict[str, Any]:
    """Without crop-ready JPEGs unless asked, so that bytes can be told from bytes."""
    options = {"crop_ready": False} | options
    return make_shards(str(spec), out, source or SourceOptions(), MakeOptions(**options), quiet)


def save(path: Path, kind: str = "JPEG", shade: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((8, 12, 3), shade, np.uint8)
    pixels[:4] = (255, 0, 0)
    Image.fromarray(pixels).save(path, kind, **options)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes, ten images each, without split folders."""
    for i in range(30):
        save(tmp_path / "photos" / ("cat", "dog", "über fox")[i % 3] / f"{i:02d}.jpg", shade=i * 8)
    return tmp_path / "photos"


def samples_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """As our own index tells them: key -> (label, encoded image)."""
    found = {}
    for shard in load_index(str(folder)).shards:
        members = load_members(Path(shard.location), shard)
        data = Path(shard.location).read_bytes()
        for i, key in enumerate(members.keys):
            start = members.image_offset[i]
            found[key] = (int(members.label[i]), data[start : start + members.image_size[i]])
    return found


def test_every_image_lands_once_with_its_label_and_its_bytes(photos: Path, tmp_path: Path):
    make(photos, tmp_path / "out", samples_per_shard=4)
    stored = samples_of(tmp_path / "out/train") | samples_of(tmp_path / "out/val")
    classes = load_index(str(tmp_path / "out/val")).classes
    originals = {(path.parent.name, path.read_bytes()) for path in photos.rglob("*.jpg")}
    assert {(classes[label], data) for label, data in stored.values()} == originals
    assert len(stored) == 30
    assert {tuple(load_index(str(tmp_path / f"out/{s}")).class_counts) for s in ("train", "val")} == {
        (9, 9, 9),
        (1, 1, 1),
    }


@needs_kernel
def test_by_default_jpegs_are_crop_ready_and_show_the_same_pixels(photos: Path, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)
    for i, sampling in enumerate((0, 1, 2)):
        Image.fromarray(pixels).save(photos / f"cat/large{i}.jpg", subsampling=sampling)
    Image.fromarray(pixels).save(photos / "cat/other.png")
    facts = make_shards(str(photos), tmp_path / "ready", SourceOptions(), MakeOptions(), quiet)["splits"]
    make(photos, tmp_path / "plain")
    written = 0
    for split in ("train", "val"):
        ready, plain = samples_of(tmp_path / "ready" / split), samples_of(tmp_path / "plain" / split)
        assert ready.keys() == plain.keys()
        for key, (label, data) in ready.items():
            assert label == plain[key][0]
            assert np.array_equal(decode_image(data, LIMIT)[0], decode_image(plain[key][1], LIMIT)[0])
            written += data != plain[key][1]
        assert list(ready) == list(plain)
    assert sum(body["converted"].get("crop_ready", 0) for body in facts.values()) == written >= 3


@needs_kernel
def test_crop_ready_shards_are_the_same_at_every_packing_and_differ_from_plain_ones(photos: Path, tmp_path: Path):
    for name in ("a", "b"):
        make(photos, tmp_path / name, crop_ready=True)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in ("a", "b"))
    assert a == b
    with pytest.raises(DataError, match="holds another shard set"):
        make(photos, tmp_path / "a")


def test_without_the_kernel_packing_keeps_jpegs_as_they_come(photos: Path, tmp_path: Path):
    code = (
        "import sys; from orchestrator.cli.main import main;"
        "sys.exit(main(['shards', 'make', sys.argv[1], sys.argv[2], '--json']))"
    )
    environment = os.environ | {"ORCHESTRATOR_KERNEL": "off", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, str(photos), str(tmp_path / "out")]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    make(photos, tmp_path / "plain")
    assert samples_of(tmp_path / "out/train") == samples_of(tmp_path / "plain/train")


@pytest.mark.parametrize(("options", "size"), [
    ({"short_side": 6}, "9x6"), ({"short_side": 8}, "12x8"), ({"short_side": 50}, "12x8"), ({"max_side": 6}, "6x4"),
    ({"short_side": 6, "max_side": 6}, "6x4"), ({"short_side": 2, "max_side": 11}, "3x2"),
])  # fmt: skip
def test_images_shrink_to_their_shorter_or_longer_side(
    photos: Path, tmp_path: Path, options: dict[str, int], size: str
):
    made = make(photos, tmp_path / "out", **options)
    assert made["splits"]["train"]["size_histogram"] == {size: 27}
    assert ("resized" in made["splits"]["train"]["converted"]) == (size != "12x8")


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves files to the collector
def test_webdataset_reads_what_we_wrote(photos: Path, tmp_path: Path):
    make(photos, tmp_path / "out", samples_per_shard=10)
    urls = [shard.location for shard in load_index(str(tmp_path / "out/train")).shards]
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "jpg", "cls")  # pyright: ignore
    read = {key: (image, label) for key, image, label in dataset}
    ours = samples_of(tmp_path / "out/train")
    gc.collect()
    assert read.keys() == ours.keys()
    for key, (label, data) in ours.items():
        assert read[key][1] == label
        assert (read[key][0] == decode_image(data, LIMIT)[0]).all()


def test_the_tar_is_what_webdatasets_own_writer_writes(photos: Path, tmp_path: Path):
    make(photos, tmp_path / "out")
    path = tmp_path / "out/val/val-000000.tar"
    buffer = io.BytesIO()
    writer = wds.TarWriter(buffer, encoder=False, mtime=0)
    for key, (label, data) in samples_of(tmp_path / "out/val").items():
        writer.write({"__key__": key, "jpg": data, "cls": str(label).encode()})
    writer.close()
    assert path.read_bytes() == buffer.getvalue()


def test_shards_are_cut_by_count_or_by_size(photos: Path, tmp_path: Path):
    make(photos, tmp_path / "a", samples_per_shard=8)
    assert [shard.nsamples for shard in load_index(str(tmp_path / "a/train")).shards] == [8, 8, 8, 3]
    items = [Item(f"{i}", 0, i, 300 << 10, "") for i in range(10)]
    source = open_source(str(photos), SourceOptions())
    source.splits["train"] = items
    assert [len(s) for s in plan_split(source, "train", MakeOptions(shard_size_mib=1)).shards] == [3, 3, 3, 1]


def test_the_seed_decides_the_order_and_the_split(photos: Path, tmp_path: Path):
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(photos, tmp_path / name, SourceOptions(seed=seed), seed=seed)
        orders.append(list(samples_of(tmp_path / name / "train")))
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_keys_are_safe_and_each_once():
    names = [
        "a/x.y.jpg",
        "a/x_y.jpg",
        "a/x y.png",
        "b/x y.jpg",
        "__meta__/1.jpg",
        "ü.jpg",
        "d/" + "l" * 300 + ".jpg",
        ".a",
    ]
    keys = make_keys([Item(name, 0, None, 0, "") for name in names])
    assert len(set(keys)) == len(names)
    for key in keys:
        assert len(f"{key}.jpeg") <= 100
        assert not set(key) & set(". \t") and key.isascii() and not key.startswith("_")  # noqa: PT018
    assert keys[3] == "b/x_y"


BAD = {
    "zero.jpg": "zero bytes",
    "text.png": "not a readable",
    "cut.jpg": "truncated",
    "bomb.png": "claims 9,000 x 9,000",
}


@pytest.fixture
def spoiled(photos: Path) -> Path:
    whole = (photos / "cat/00.jpg").read_bytes()
    (photos / "cat/zero.jpg").write_bytes(b"")
    (photos / "cat/text.png").write_bytes(b"<html>" * 50)
    (photos / "dog/cut.jpg").write_bytes(whole[:-40])
    Image.new("1", (9000, 9000)).save(photos / "dog/bomb.png")
    (photos / "dog/gone.jpg").symlink_to(photos / "nowhere.jpg")
    return photos


def test_all_bad_images_are_listed_and_nothing_is_left(spoiled: Path, tmp_path: Path):
    with pytest.raises(DataError, match="5 images cannot be used, nothing was written") as caught:
        make(spoiled, tmp_path / "out", samples_per_shard=5, max_pixels=LIMIT)
    for name, reason in (BAD | {"gone.jpg": "No such file"}).items():
        assert any(name in line and reason in line for line in str(caught.value).splitlines())
    assert list((tmp_path / "out").rglob("*")) == []


def test_skip_leaves_bad_images_out_and_counts_them(spoiled: Path, tmp_path: Path):
    made = make(spoiled, tmp_path / "out", samples_per_shard=5, max_pixels=LIMIT, on_bad="skip")
    assert sum(body["skipped"] for body in made["splits"].values()) == 5
    stored = [*samples_of(tmp_path / "out/train"), *samples_of(tmp_path / "out/val")]
    assert len(stored) == 30
    assert sum(sum(load_index(str(tmp_path / "out" / s)).class_counts) for s in ("train", "val")) == 30


def test_more_than_twenty_bad_images_end_in_a_count(photos: Path, tmp_path: Path):
    for path in photos.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"30 images cannot be used") as caught:
        make(photos, tmp_path / "out")
    assert str(caught.value).count("zero bytes") == 20
    assert "... and 10 more" in str(caught.value)
    with pytest.raises(DataError, match="none of 27 train images"):
        make(photos, tmp_path / "out", on_bad="skip")


def test_converted_images_are_right_and_counted(photos: Path, tmp_path: Path):
    save(photos / "cat/a.gif", "GIF", save_all=True, append_images=[Image.new("RGB", (12, 8), "blue")])
    exif = Image.Exif()
    exif[0x0112] = 6
    save(photos / "cat/b.jpg", "JPEG", exif=exif, quality=95, subsampling=0)
    Image.new("CMYK", (12, 8), (0, 255, 255, 0)).save(photos / "cat/c.jpg", quality=95)
    Image.fromarray(np.full((8, 12), 40_000, np.uint16)).save(photos / "cat/d.png")
    save(photos / "cat/e.bmp", "BMP")
    made = make(photos, tmp_path / "out", SourceOptions(val_fraction=0))
    converted = made["splits"]["train"]["converted"]
    assert converted == {
        "16bit": 1,
        "animated": 1,
        "cmyk": 1,
        "exif": 1,
        "other_format": 2,
        "palette": 1,
        "reencoded": 5,
    }
    stored = samples_of(tmp_path / "out/train")
    pixels = {key[-1]: decode_image(stored[f"cat/{key[-1]}"][1], LIMIT)[0].astype(int) for key in "abcde"}
    assert np.abs(pixels["a"][0, 0] - (255, 0, 0)).max() <= 1
    assert (pixels["b"].shape, np.abs(pixels["b"][6, 7] - (255, 0, 0)).max() < 40) == ((12, 8, 3), True)
    assert np.abs(pixels["c"][4, 4] - (255, 0, 0)).max() < 12
    assert (pixels["d"] == round(40_000 * 255 / 65535)).all()
    assert pixels["e"][0, 0].tolist() == [255, 0, 0]


def test_digits_are_split_by_class_once_for_all(tmp_path: Path):
    a, b = (open_source("digits", SourceOptions(seed=seed)).splits for seed in (0, 7))
    names = {split: {item.name for item in items} for split, items in a.items()}
    assert a == b
    assert (len(a["train"]), len(a["val"])) == (1438, 359)
    assert not names["train"] & names["val"]
    assert len(names["train"] | names["val"]) == 1797
    counts = {split: Counter(item.label for item in items) for split, items in a.items()}
    for label in range(10):
        assert counts["val"][label] == round(0.2 * (counts["val"][label] + counts["train"][label]))


def test_digit_pixels_are_scikit_learns_scaled_to_255(tmp_path: Path):
    from sklearn.datasets import load_digits

    make("digits", tmp_path)
    bunch: Any = load_digits()
    for key, (label, data) in samples_of(tmp_path / "val").items():
        assert label == bunch.target[int(key)]
        assert (decode_image(data, 64)[0][..., 1] == np.round(bunch.images[int(key)] * 255 / 16)).all()


def test_a_split_does_not_depend_on_the_order_of_the_listing():
    items = [Item(f"{i}", i % 3, None, 0, "") for i in range(100)]
    forward, backward = split_by_hash(items, 0.1, 0), split_by_hash(items[::-1], 0.1, 0)
    assert forward == backward
    assert Counter(item.label for item in forward["val"]) == {0: 3, 1: 3, 2: 3}
    assert split_by_hash([Item("a", 0, None, 0, ""), Item("b", 1, None, 0, "")], 0.5, 0)["val"] == []


def as_archive(folder: Path, path: Path) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for image in sorted(folder.rglob("*.jpg")):
                file.write(image, Path("top") / image.relative_to(folder))
        return path
    with tarfile.open(path, f"w:{path.suffix[1:].replace('tar', '')}") as file:
        file.add(folder, "top")
    return path


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
def test_an_archive_gives_what_its_folder_gives(photos: Path, tmp_path: Path, name: str):
    make(photos, tmp_path / "folder")
    archive = as_archive(photos, tmp_path / name)
    plan = plan_shards(str(archive), SourceOptions(), MakeOptions())
    assert plan["splits"] == {"train": {"samples": 27, "shards": 1}, "val": {"samples": 3, "shards": 1}}
    make(archive, tmp_path / "archive")
    for split in ("train", "val"):
        assert samples_of(tmp_path / "archive" / split) == samples_of(tmp_path / "folder" / split)
    assert sorted(p.name for p in (tmp_path / "archive").iterdir()) == ["train", "val"]


def test_a_damaged_archive_is_the_users_to_mend(photos: Path, tmp_path: Path):
    for name in ("x.tar.gz", "x.zip"):
        archive = as_archive(photos, tmp_path / name)
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
        with pytest.raises(DataError, match="damaged archive"):
            make(archive, tmp_path / "out")


@pytest.mark.parametrize("val", ["val", "validation", "test"])
def test_split_folders_are_kept(tmp_path: Path, val: str):
    for split, number in (("train", 4), (val, 2), ("notes", 1)):
        for i in range(number):
            save(tmp_path / "in" / split / f"class{i % 2}" / f"{i}.png", "PNG")
    made = make(tmp_path / "in", tmp_path / "out")
    assert {split: sum(body["class_counts"]) for split, body in made["splits"].items()} == {"train": 4, "val": 2}
    assert made["ignored_files"] == 1


def test_a_manifest_gives_names_or_numbers_to_classes(photos: Path):
    rows = ["path,label,split", "cat/00.jpg,zebra,train", "dog/01.jpg,ant,", "cat/03.jpg,ant,validation"]
    (photos / "named.csv").write_text("\n".join(rows))
    source = open_source(str(photos / "named.csv"), SourceOptions())
    assert source.classes == ("ant", "zebra")
    assert [(item.name, item.label) for item in source.splits["train"]] == [("cat/00.jpg", 1), ("dog/01.jpg", 0)]
    assert [item.name for item in source.splits["val"]] == ["cat/03.jpg"]
    (photos / "numbered.csv").write_text("label,path\n3,cat/00.jpg\n0,dog/01.jpg\n")
    assert open_source(str(photos / "numbered.csv"), SourceOptions()).classes == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,class\n", "header is 'file,class'"),
        ("path,label\nno1.jpg,a\nno2.jpg,b\ncat/00.jpg,a\n", r"2 of 3 files do not exist:\n  no1.jpg\n  no2.jpg"),
        ("path,label,split\ncat/00.jpg,a,dev\n,b,\n", r"2 faults:\n  line 2: split 'dev'.*\n  line 3: path and label"),
        ("path,label\ncat/00.jpg,a\ncat/00.jpg,b\n", "cat/00.jpg stands there twice"),
        ("path,label\ncat/00.jpg,99999999999\n", "too large"),
        ("path,label\n", "no training image"),
        (b"path,label\ncat/00.jpg,\xff\n", "cannot be read"),
    ],
)
def test_a_faulty_manifest_names_its_lines(photos: Path, content: str | bytes, message: str):
    path = photos / "list.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        open_source(str(path), SourceOptions())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no image among 0 files"),
        (["a/readme.txt"], "no image among 1 files"),
        (["1.jpg", "2.jpg"], "no class folders"),
        (["cat/1.jpg", "cat/2.jpg"], "no class folders|one class"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/c/1.jpg"], r"1 classes have validation but no training images:\n  c"),
    ],
)
def test_a_folder_without_classes_is_refused(tmp_path: Path, files: list[str], message: str):
    root = tmp_path / "in"
    root.mkdir()
    for name in files:
        save(root / name) if name.endswith("jpg") else (root / name).parent.mkdir() or (root / name).write_text("x")
    with pytest.raises(DataError, match=message):
        open_source(str(root), SourceOptions())


def test_an_unknown_source_gets_the_nearest_name(photos: Path):
    with pytest.raises(DataError, match="did you mean 'digits'"):
        open_source("digit", SourceOptions())
    with pytest.raises(DataError, match=r"did you mean '.*/photos'"):
        open_source(str(photos.parent / "photo"), SourceOptions())
    with pytest.raises(DataError, match="did you mean 'CIFAR10'"):
        open_source("torchvision:CIFAR01", SourceOptions())


def test_torchvision_classes_give_their_images(photos: Path, tmp_path: Path):
    made = make("torchvision:ImageFolder", tmp_path / "out", SourceOptions(root=str(photos)))
    assert {split: sum(body["class_counts"]) for split, body in made["splits"].items()} == {"train": 27, "val": 3}
    assert load_index(str(tmp_path / "out/train")).classes == ("cat", "dog", "über fox")
    with pytest.raises(DataError, match=r"not found.*Way out: --root"):
        open_source("torchvision:CIFAR10", SourceOptions(root=str(tmp_path)))


def test_torchvision_splits_are_kept(tmp_path: Path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, number in (("train", 6), ("t10k", 3)):
        pixels = np.arange(number * 4, dtype=np.uint8).reshape(number, 2, 2)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, number, 2, 2) + pixels.tobytes())
        labels = (np.arange(number) % 3).astype(np.uint8)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, number) + labels.tobytes())
    make("torchvision:MNIST", tmp_path / "out", SourceOptions(root=str(tmp_path)))
    train, val = samples_of(tmp_path / "out/train"), samples_of(tmp_path / "out/val")
    assert (len(train), len(val)) == (6, 3)
    label, data = val["val/0000002"]
    assert (label, decode_image(data, 64)[0][..., 0].tolist()) == (2, [[8, 9], [10, 11]])


def test_a_package_offers_a_data_set_by_entry_point(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_birds.py").write_text(
        "from pathlib import Path\n"
        "from PIL import Image\n"
        "class Birds(list):\n"
        "    classes = ('crow', 'gull')\n"
        "def load(split):\n"
        f"    photo = Path({str(photos)!r}) / 'cat' / '00.jpg'\n"
        "    if split == 'val':\n"
        "        return [(photo, 1)]\n"
        "    return Birds([(photo.read_bytes(), 0), (Image.new('P', (3, 2)), 1), (str(photo), 1)])\n"
    )
    described = tmp_path / "own_birds-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: own-birds\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[orchestrator.datasets]\nbirds = own_birds:load\n")
    monkeypatch.syspath_prepend(tmp_path)
    make("birds", tmp_path / "out")
    photo = (photos / "cat/00.jpg").read_bytes()
    train, val = samples_of(tmp_path / "out/train"), samples_of(tmp_path / "out/val")
    assert load_index(str(tmp_path / "out/train")).classes == ("crow", "gull")
    assert [train[f"train/000000{i}"] for i in (0, 2)] == [(0, photo), (1, photo)]
    assert decode_image(train["train/0000001"][1], 64)[0].shape == (2, 3, 3)
    assert list(val.values()) == [(1, photo)]
    with pytest.raises(DataError, match="did you mean 'birds'"):
        open_source("bird", SourceOptions())


def test_synthetic_classes_can_be_told_apart_by_a_nearest_mean(tmp_path: Path):
    source = open_source("synthetic", SourceOptions(samples=200, classes=4, size=16))
    spectra = {
        split: np.stack([np.abs(np.fft.fft2(source.read(i.ref).mean(2)))[:8].ravel() for i in items])
        for split, items in source.splits.items()
    }
    labels = {split: np.array([item.label for item in items]) for split, items in source.splits.items()}
    means = np.stack([spectra["train"][labels["train"] == label].mean(0) for label in range(4)])
    nearest = np.linalg.norm(spectra["val"][:, None] - means, axis=2).argmin(1)
    assert (nearest == labels["val"]).mean() > 0.8


def test_a_finished_set_is_left_alone_and_another_one_is_not_overwritten(photos: Path, tmp_path: Path):
    make(photos, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    make(photos, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")} == before
    with pytest.raises(DataError, match="holds another shard set"):
        make(photos, tmp_path / "out", quality=50)
    foreign = tmp_path / "foreign/train"
    foreign.mkdir(parents=True)
    (foreign / "mine.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match="holds another shard set"):
        make(photos, tmp_path / "foreign")
    assert (foreign / "mine.tar").read_bytes() == b"precious"


def test_a_dry_run_writes_nothing(photos: Path, tmp_path: Path):
    plan = plan_shards(str(photos), SourceOptions(), MakeOptions(samples_per_shard=10))
    assert plan["splits"] == {"train": {"samples": 27, "shards": 3}, "val": {"samples": 3, "shards": 1}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_an_output_that_cannot_be_a_folder_is_refused(photos: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make(photos, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("option", "value"), [("quality", 0), ("quality", 101), ("workers", 0), ("max_side", -1), ("short_side", 0)]
)
def test_options_out_of_range_are_refused_by_name(option: str, value: int):
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} = {value}: must be between"):
        MakeOptions(**{option: value})


def test_many_sizes_become_buckets_that_lose_no_image():
    sizes = {f"{w}x{h}": w for w in range(1, 30) for h in (7, 300)}
    buckets = bucket_sizes(sizes)
    assert sum(buckets.values()) == sum(sizes.values())
    assert list(buckets) == ["longer side 5-8", "longer side 9-16", "longer side 17-32", "longer side 257-512"]
    assert bucket_sizes({"2x2": 1, "1x1": 5}) == {"1x1": 5, "2x2": 1}


def test_the_index_is_one_that_wids_understands(photos: Path, tmp_path: Path):
    make(photos, tmp_path / "out")
    body = json.loads((tmp_path / "out/val/shards.json").read_text())
    assert (body["schema"], body["__kind__"], body["wids_version"]) == (1, "wids-shard-index-v1", 1)
    assert body["shardlist"][0]["url"] == "val-000000.tar"
    assert body["shardlist"][0]["filesize"] == (tmp_path / "out/val/val-000000.tar").stat().st_size
    assert body["classes"] == ["cat", "dog", "über fox"]
    assert body["size_histogram"] == {"12x8": 3}
