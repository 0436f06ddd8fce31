"""Shards in both directions: tars that other tools made are read as they are, and others read ours.

Packages that are not in the lock are tried where they are installed (`docs/foreign-shards.md` says how); such a test
is slow and is skipped by name where they are not.
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from orchestrator.cli.main import main
from orchestrator.config import DataConfig
from orchestrator.data.crop_ready import is_available
from orchestrator.data.index import load_index, load_members
from orchestrator.data.indexing import index_tars
from orchestrator.data.members import read_idx
from orchestrator.data.order import TrainPlan
from orchestrator.data.plan import MakeOptions
from orchestrator.data.sources import SourceOptions
from orchestrator.data.stream import Split, train_loader
from orchestrator.data.verify import verify_set
from orchestrator.data.writer import make_shards
from orchestrator.errors import DataError
from tests.data.test_stream import SEED, config

__all__ = ["config"]

SAMPLES = 12
CLASSES = 3
LONG = "n" * 90 + "/" + "m" * 120

needs_kernel = pytest.mark.skipif(not is_available(), reason="no compiled kernel here")
no_warning_of_others = pytest.mark.filterwarnings("ignore")


class Sample(NamedTuple):
    key: str
    label: int
    image: bytes


def picture(id: int, kind: str = "JPEG", size: tuple[int, int] = (10, 10)) -> bytes:
    pixels = np.random.default_rng(id).integers(0, 256, (*size, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def samples(folder: str = "", kind: str = "JPEG") -> list[Sample]:
    return [Sample(f"{folder}{id:06d}", id % CLASSES, picture(id, kind)) for id in range(SAMPLES)]


def lay_out(root: Path, made: list[Sample], members: Callable[[Sample], dict[str, bytes]]) -> None:
    for sample in made:
        for extension, content in members(sample).items():
            path = root / f"{sample.key}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def image_and_class(sample: Sample) -> dict[str, bytes]:
    return {"jpg": sample.image, "cls": b"%d\n" % sample.label}


def by_tar_program(form: str, where: str, key: str) -> Callable[[Path], list[Sample]]:
    """`tar` of a folder, sorted by name, with directory entries and where asked with ./ before each name."""

    def write(folder: Path) -> list[Sample]:
        made = samples(key)
        lay_out(folder / "files", made, image_and_class)
        names = [where] if where == "." else sorted(path.name for path in (folder / "files").iterdir())
        subprocess.run(
            ["tar", f"--format={form}", "--sort=name", "-cf", folder / "x.tar", "-C", folder / "files", *names],
            check=True,
        )
        prefix = "./" if where == "." else ""
        return [sample._replace(key=prefix + sample.key) for sample in made]

    return write


def by_shard_writer(folder: Path) -> list[Sample]:
    with wds.ShardWriter(str(folder / "x-%06d.tar"), maxcount=5, verbose=0) as sink:
        for one in samples("some.folder/"):
            sink.write({"__key__": one.key, "jpg": one.image, "cls": one.label, "json": {"id": one.key}})
    return samples("some.folder/")


def by_tar_writer(folder: Path) -> list[Sample]:
    """Pixels that webdataset encodes itself, as PNG, and a text beside them."""
    with wds.TarWriter(str(folder / "x.tar")) as sink:
        for one in samples(kind="PNG"):
            image = Image.open(io.BytesIO(one.image))
            sink.write({"__key__": one.key, "png": image, "cls": one.label, "txt": f"number {one.label}"})
    with tarfile.open(folder / "x.tar") as tar:
        images = [tar.extractfile(member) for member in tar if member.name.endswith(".png")]
        stored = [image.read() for image in images if image]
    return [one._replace(image=image) for one, image in zip(samples(), stored, strict=True)]


def write_plain(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def by_img2dataset(folder: Path) -> list[Sample]:
    """Its webdataset output: jpg, json and txt of each sample in 00000.tar, 00000.parquet and 00000_stats.json beside.

    The class is a column that `--save_additional_columns` puts into the JSON.
    """
    for shard, some in enumerate((samples()[:7], samples()[7:])):
        members = []
        for one in some:
            meta = {"caption": "a photo", "url": "https://x/y.jpg", "key": one.key, "status": "success",
                    "error_message": None, "width": 10, "height": 10, "label": one.label, "sha256": ""}  # fmt: skip
            members += [
                (f"{one.key}.jpg", one.image),
                (f"{one.key}.json", json.dumps(meta, indent=4).encode()),
                (f"{one.key}.txt", b"a photo"),
            ]
        write_plain(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 7}')
    return samples()


def by_names(extension: str) -> Callable[[Path], list[Sample]]:
    """Class names where others write numbers: in a text member, or in a field of JSON."""

    def write(folder: Path) -> list[Sample]:
        names = ("ant", "bee", "cow über")
        members: list[tuple[str, bytes]] = []
        for one in samples():
            name = names[one.label]
            content = f"{name}\n" if extension == "txt" else json.dumps({"class": name, "label": 9})
            members += [(f"{one.key}.jpg", one.image), (f"{one.key}.{extension}", content.encode())]
        write_plain(folder / "x-0.tar", members[:8])
        write_plain(folder / "x-1.tar", members[8:])
        return samples()

    return write


def by_hugging_face(folder: Path) -> list[Sample]:
    """As data sets on the hub come: upper case, folders with dots, metadata at the root, a mask of each image."""
    members = [("README", b"no extension")]
    for one in samples("v1.0/train/"):
        members += [
            (f"{one.key}.CLS", b" %d" % one.label),
            (f"{one.key}.JPEG", one.image),
            (f"{one.key}.seg.PNG", b"m"),
        ]
    write_plain(folder / "train-00000-of-00001.tar", members)
    return samples("v1.0/train/")


MAKERS: dict[str, tuple[Callable[[Path], list[Sample]], str]] = {
    "tar --format=gnu": (by_tar_program("gnu", "*", "a/b/"), "cls"),
    "tar --format=gnu, ./": (by_tar_program("gnu", ".", "a/b/"), "cls"),
    "tar --format=gnu, long names": (by_tar_program("gnu", "*", LONG), "cls"),
    "tar --format=pax": (by_tar_program("pax", "*", "über/"), "cls"),
    "tar --format=pax, long names, ./": (by_tar_program("pax", ".", LONG), "cls"),
    "tar --format=ustar": (by_tar_program("ustar", ".", "a/"), "cls"),
    "tar --format=v7": (by_tar_program("v7", "*", "a/"), "cls"),
    "webdataset.ShardWriter": (by_shard_writer, "cls"),
    "webdataset.TarWriter": (by_tar_writer, "cls"),
    "img2dataset": (by_img2dataset, "json:label"),
    "names in .txt": (by_names("txt"), "txt"),
    "names in JSON": (by_names("json"), "json:class"),
    "Hugging Face": (by_hugging_face, "cls"),
}


@pytest.fixture(scope="module", params=MAKERS)
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[Sample]]:
    """A folder of tars, the place of its labels, and what the tars hold in their order."""
    folder = tmp_path_factory.mktemp("foreign")
    write, label = MAKERS[request.param]
    return folder, label, write(folder)


OTHERS = {
    "webdataset.ShardWriter": {"json": 12},
    "webdataset.TarWriter": {"txt": 12},
    "img2dataset": {"txt": 12},
    "Hugging Face": {"seg.png": 12},
}


def test_members_that_are_left_unread_are_counted(
    request: pytest.FixtureRequest, foreign: tuple[Path, str, list[Sample]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, label, _ = foreign
    assert main(["shards", "index", str(folder), "--label", label]) == 0
    others = OTHERS.get(request.node.callspec.params["foreign"], {})
    assert json.loads((folder / "shards.json").read_text()).get("ignored_members", {}) == others
    said = capsys.readouterr().err
    assert ("left unread" in said) == bool(others)
    assert all(f"{number} {extension}" in said for extension, number in others.items())


def read_back(folder: Path) -> list[Sample]:
    found = []
    for shard in load_index(str(folder)).shards:
        path = Path(shard.location)
        members, data = load_members(path, shard), path.read_bytes()
        for key, at, size, label in zip(
            members.keys, members.image_offset, members.image_size, members.label, strict=True
        ):
            found.append(Sample(key, int(label), data[at : at + size]))
    return found


def test_tars_of_other_tools_are_indexed_unchanged_and_found_sound(foreign: tuple[Path, str, list[Sample]]) -> None:
    folder, label, expected = foreign
    before = {path: path.read_bytes() for path in folder.glob("*.tar")}
    index_tars(str(folder), label, None, lambda _: None)
    assert read_back(folder) == expected
    assert {path: path.read_bytes() for path in folder.glob("*.tar")} == before
    index = load_index(str(folder))
    assert index.class_counts == (4, 4, 4)
    assert verify_set(index, 1000, lambda _: None) == []


@no_warning_of_others
def test_webdataset_finds_the_same_samples_in_them(foreign: tuple[Path, str, list[Sample]]) -> None:
    folder, _, expected = foreign
    pipeline = wds.WebDataset([str(tar) for tar in sorted(folder.glob("*.tar"))], shardshuffle=False)
    assert [sample["__key__"] for sample in pipeline] == [sample.key for sample in expected]


def test_the_command_line_indexes_verifies_and_shows_them(foreign: tuple[Path, str, list[Sample]]) -> None:
    folder, label, expected = foreign
    wanted = ("cow über", "bee", "ant") if label in ("txt", "json:class") else ("cat", "dog", "fox")
    (folder / "names.list").write_text("\n".join(wanted))
    names = ["--classes", str(folder / "names.list")]
    assert main(["shards", "index", str(folder), "--label", label, *names]) == 0
    assert main(["shards", "verify", str(folder)]) == 0
    assert main(["shards", "inspect", str(folder), "--png", str(folder / "sheet.png")]) == 0
    assert load_index(str(folder)).classes == wanted
    assert [3 - 1 - one.label if "ant" in wanted else one.label for one in read_back(folder)] == [
        one.label for one in expected
    ]
    assert (folder / "sheet.png").stat().st_size


def test_training_reads_each_of_their_samples_once(foreign: tuple[Path, str, list[Sample]], config: DataConfig) -> None:
    folder, label, expected = foreign
    (folder / "shards.json").unlink(missing_ok=True)  # whose class names it would keep
    index_tars(str(folder), label, None, lambda _: None)
    index = load_index(str(folder))
    plan = TrainPlan(tuple(shard.nsamples for shard in index.shards), SEED, 5, 2)
    split = Split(index, config, SEED, CLASSES, 0, 1)
    seen = [
        (int(id), int(label))
        for batch in train_loader(plan, split, 1, range(plan.steps_per_epoch))
        for id, label in zip(batch.ids, batch.labels, strict=True)
    ]
    assert sorted(seen) == [(i, sample.label) for i, sample in enumerate(expected)]


def test_indexing_again_keeps_the_order_of_class_names(tmp_path: Path) -> None:
    expected = by_names("txt")(tmp_path)
    (tmp_path / "names.list").write_text("cow über\nbee\nant\ndodo")
    assert main(["shards", "index", str(tmp_path), "--label", "txt", "--classes", str(tmp_path / "names.list")]) == 0
    assert main(["shards", "index", str(tmp_path), "--label", "txt"]) == 0
    assert load_index(str(tmp_path)).classes == ("cow über", "bee", "ant", "dodo")
    assert [one.label for one in read_back(tmp_path)] == [2 - one.label for one in expected]


@needs_kernel
def test_conversion_keeps_class_names_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    expected = by_names("json")(tmp_path / "in")
    assert main(["shards", "index", str(tmp_path / "in"), "--label", "json:class"]) == 0
    assert main(["shards", "convert", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert [one.label for one in read_back(tmp_path / "out")] == [one.label for one in expected]
    assert load_index(str(tmp_path / "out")).classes == ("ant", "bee", "cow über")


@pytest.mark.parametrize(
    ("members", "label", "fault"),
    [
        ([("a.jpg", b"x"), ("a.txt", b"a photo")], "cls", r"a at byte.*0 cls labels, must be 1; it has jpg, txt"),
        ([("a.cls", b"1")], "cls", "0 images"),
        ([("a.1.jpg", b"x"), ("a.1.cls", b"1")], "cls", r"its key ends at the first dot"),
        ([("a.jpg", b"x"), ("a.json", b"{'label': 1}")], "json:label", "json is not JSON"),
        ([("a.jpg", b"x"), ("a.json", b'{"class": 1}')], "json:label", "no field label; its fields: class"),
        (
            [("a.jpg", b"x"), ("a.json", b'{"label": 1.5}')],
            "json:label",
            r"label 1\.5 is neither an integer from 0 up nor a name",
        ),
        (
            [("a.jpg", b"x"), ("a.json", b'{"label": true}')],
            "json:label",
            "label True is neither an integer from 0 up nor a name",
        ),
        ([("a.jpg", b"x"), ("a.json", b'{"label": "-1"}')], "json:label", "label '-1' is not an integer from 0 up"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": ["cat"]}')], "json:label", r"label \['cat'\] is neither"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "cls", "label b'-1' is not an integer from 0 up"),
        ([("a.jpg", b"x"), ("a.cls", b"cat"), ("b.jpg", b"x"), ("b.cls", b"7")], "cls", "labels are names, but 7"),
        (
            [("a.jpg", b"x"), ("a.cls", b"7"), ("b.jpg", b"x"), ("b.cls", b"cat")],
            "cls",
            "label 'cat' is not an integer",
        ),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1"), ("b.cls", b"1")], "cls", r"tar --sort=name"),
    ],
)
def test_a_sample_that_lacks_something_is_named_with_what_it_has(
    tmp_path: Path, members: list[tuple[str, bytes]], label: str, fault: str
) -> None:
    write_plain(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=fault):
        index_tars(str(tmp_path), label, None, lambda _: None)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training split of several shards, its JPEGs crop-ready where this machine can write them."""
    root = tmp_path_factory.mktemp("ours")
    for id in range(20):
        path = root / "photos" / ("cat", "dog")[id % 2] / f"{id:02d}.{('jpg', 'png')[id == 7]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(id, ("JPEG", "PNG")[id == 7], (60, 90)))  # room for restart markers
    options = MakeOptions(samples_per_shard=5, workers=1)
    make_shards(str(root / "photos"), root / "out", SourceOptions(), options, lambda *_: nullcontext(lambda _: None))
    marked = [b"\xff\xd1" in sample.image for sample in read_back(root / "out/train") if sample.image[0] == 0xFF]
    assert all(marked) or not is_available()
    return root / "out" / "train"


def tars_of(folder: Path) -> list[str]:
    return [str(tar) for tar in sorted(folder.glob("*.tar"))]


def as_sample(key: str, label: Any, fields: dict[str, Any], dot: str = "") -> Sample:
    image = fields.get(f"{dot}jpg") or fields.get(f"{dot}png")
    assert isinstance(image, bytes)
    return Sample(key, int(label), image)


@no_warning_of_others
def test_webdataset_reads_ours_with_keys_classes_and_bytes(ours: Path) -> None:
    pipeline = wds.WebDataset(tars_of(ours), shardshuffle=False)
    found = [as_sample(sample["__key__"], sample["cls"], sample) for sample in pipeline]
    assert found == read_back(ours)
    decoded = wds.WebDataset(tars_of(ours), shardshuffle=False).decode("pil").to_tuple("jpg;png", "cls")
    assert [(image.size, label) for image, label in decoded] == [((90, 60), sample.label) for sample in found]


def entries_of_tar_program(path: str) -> Iterator[tuple[str, int]]:
    """Name and first data byte of each file by GNU tar's own block numbers, as DALI's wds2idx takes them."""
    listing = subprocess.run(["tar", "--list", "--block-number", "--file", path], capture_output=True, check=True)
    entries = [re.fullmatch(r"block (\d+): (.*)", line) for line in listing.stdout.decode().splitlines()]
    found = [(match[2], int(match[1]) * 512) for match in entries if match]
    yield from ((name, start + 512) for name, start in found if not name.startswith("**"))


def words_of_idx(tar: str) -> list[list[str]]:
    """`v1.2 SAMPLES`, then a line per sample with four words for each member: extension, offset, size and name."""
    head, *lines = Path(tar).with_suffix(".idx").read_text().splitlines()
    assert head == f"v1.2 {len(lines)}"
    words = [line.split(" ") for line in lines]
    return [word[i : i + 4] for word in words for i in range(0, len(word), 4)]


def test_each_field_of_our_idx_is_what_dali_documents(ours: Path) -> None:
    for tar in tars_of(ours):
        with tarfile.open(tar) as opened:
            sizes = [info.size for info in opened]
        places = zip(entries_of_tar_program(tar), sizes, strict=True)
        assert words_of_idx(tar) == [
            [name.split("/")[-1].partition(".")[2], str(offset), str(size), name] for (name, offset), size in places
        ]
        assert read_idx(Path(tar).with_suffix(".idx"), Path(tar).stat().st_size) is not None


def test_the_idx_of_other_tools_tars_points_at_every_file_with_an_extension(
    foreign: tuple[Path, str, list[Sample]],
) -> None:
    index_tars(str(foreign[0]), foreign[1], None, lambda _: None)
    for tar in tars_of(foreign[0]):
        with tarfile.open(tar) as opened:
            files = [info for info in opened if info.isreg() and "." in info.name.split("/")[-1]]
        assert words_of_idx(tar) == [
            [info.name.split("/")[-1].partition(".")[2], str(info.offset_data), str(info.size), info.name]
            for info in files
        ]


@pytest.mark.slow
@no_warning_of_others
def test_wids_reads_our_index_and_gives_every_sample_by_number(ours: Path, tmp_path: Path) -> None:
    wids = pytest.importorskip("wids", reason="wids is not installed (webdataset < 1 brings it)")
    expected = read_back(ours)
    for _ in ("into an empty cache", "out of the cache"):
        dataset = wids.ShardListDataset(
            str(ours / "shards.json"), cache_dir=str(tmp_path / "cache"), transformations=[]
        )
        assert len(dataset) == len(expected)
        order = random.Random(0).sample(range(len(expected)), len(expected))
        for i in order:
            fields = {key: value.read() if key[0] == "." else value for key, value in dataset[i].items()}
            assert as_sample(fields["__key__"], fields[".cls"], fields, ".") == expected[i]
    assert {path.name for path in (tmp_path / "cache").glob("*.tar")} == {Path(tar).name for tar in tars_of(ours)}


@pytest.mark.slow
@no_warning_of_others
@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_datasets_read_ours(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    jpegs = [tar for tar in tars_of(ours) if b".png\0" not in Path(tar).read_bytes()]
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": jpegs}, split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    assert loaded.features["jpg"] == datasets.Image()
    plain = loaded.cast_column("jpg", datasets.Image(decode=False))
    found = [Sample(row["__key__"], row["cls"], row["jpg"]["bytes"]) for row in plain]
    names = {Path(tar).name for tar in jpegs}
    shards = [shard for shard in load_index(str(ours)).shards if Path(shard.location).name in names]
    keys = [key for shard in shards for key in load_members(Path(shard.location), shard).keys]
    assert found == [sample for sample in read_back(ours) if sample.key in keys]


@pytest.mark.slow
@no_warning_of_others
def test_litdata_reads_ours(ours: Path) -> None:
    """It keys samples by the base name alone."""
    litdata = pytest.importorskip("litdata", reason="litdata is not installed")
    found = [
        as_sample(sample["__key__"], sample["cls"], sample)
        for tar in tars_of(ours)
        for sample in litdata.iter_webdataset_tar(tar)
    ]
    assert found == [sample._replace(key=sample.key.rsplit("/", 1)[-1]) for sample in read_back(ours)]


@pytest.mark.slow
@no_warning_of_others
def test_torchdata_pipes_read_ours(ours: Path) -> None:
    pipes = pytest.importorskip("torchdata.datapipes.iter", reason="torchdata <= 0.9 is not installed")
    stream = pipes.FileOpener(pipes.IterableWrapper(tars_of(ours)), mode="b").load_from_tar().webdataset()
    found = [
        as_sample(
            sample["__key__"].split(".tar/")[-1],
            sample[".cls"].read(),
            {key: value.read() for key, value in sample.items() if key in (".jpg", ".png")},
            ".",
        )
        for sample in stream
    ]
    assert found == read_back(ours)


@pytest.mark.slow
@no_warning_of_others
def test_dali_reads_ours_with_our_idx_and_without_a_gpu(ours: Path, tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    wds2idx = pytest.importorskip("wds2idx", reason="nvidia-dali is not installed")
    tars, expected = tars_of(ours), read_back(ours)
    indices = [tar.removesuffix("tar") + "idx" for tar in tars]
    for tar, index in zip(tars, indices, strict=True):
        with wds2idx.IndexCreator(tar, str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "theirs.idx").read_bytes() == Path(index).read_bytes()

    @dali.pipeline_def(batch_size=len(expected), num_threads=1, device_id=None)
    def pipeline() -> Any:
        return tuple(
            dali.fn.readers.webdataset(
                paths=tars, index_paths=indices, ext=["jpg;png", "cls"], missing_component_behavior="error"
            )
        )

    built = pipeline()
    built.build()
    images, labels = built.run()
    found = [(int(bytes(np.asarray(labels[i]))), bytes(np.asarray(images[i]))) for i in range(len(expected))]
    assert found == [(sample.label, sample.image) for sample in expected]
