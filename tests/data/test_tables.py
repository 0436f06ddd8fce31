"""Tables become shard sets: each row once, its bytes untouched, its class by name, and what does not fit is named."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.cli.main import main
from orchestrator.data.images import encode_image
from orchestrator.data.index import load_index
from orchestrator.data.sources import SourceOptions, open_source
from orchestrator.data.tables import is_table_source
from orchestrator.errors import EXIT_USER, DataError
from tests.data.test_writer import make, samples_of

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CLASSES = ["cat", "dog", "über fox"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

Rows = dict[str, list[Any]]


def image(number: int, kind: str = "JPEG") -> bytes:
    return encode_image(np.full((8, 12, 3), number * 7 % 256, np.uint8), kind, 90)


def rows(number: int, begin: int = 0, classes: int = 3) -> Rows:
    """Image cells as `datasets` writes them, classes in turn."""
    numbers = range(begin, begin + number)
    cells = [{"bytes": image(i, "PNG" if i % 4 == 0 else "JPEG"), "path": f"{i}.jpg"} for i in numbers]
    return {"image": cells, "label": [i % classes for i in numbers]}


def features(names: list[str] | None) -> dict[bytes, bytes]:
    """What `datasets` 5.2.0 writes into the schema of its files."""
    label = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    return {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}}).encode()}


def table(data: Rows, names: list[str] | None = CLASSES, kind: pa.DataType = IMAGE) -> pa.Table:
    columns = {name: pa.array(values, kind if name in ("image", "photo") else None) for name, values in data.items()}
    return pa.table(columns).replace_schema_metadata(features(names))


def parquet(path: Path, data: Rows | pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(data if isinstance(data, pa.Table) else table(data), path, **options)
    return path


def saved(folder: Path, data: Rows, shards: int = 1, names: list[str] | None = CLASSES) -> Path:
    """A data set as `save_to_disk` of `datasets` 5.2.0 leaves it: Arrow streams and two JSON files."""
    folder.mkdir(parents=True)
    whole, files = table(data, names), []
    for i, part in enumerate(np.array_split(np.arange(len(whole)), shards)):
        files.append({"filename": f"data-{i:05d}-of-{shards:05d}.arrow"})
        with pa.ipc.new_stream(folder / files[-1]["filename"], whole.schema) as stream:
            stream.write_table(whole.slice(int(part[0]), len(part)), max_chunksize=5)
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "0", "_split": None}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def packed(spec: Path, out: Path, **options: Any) -> dict[str, list[tuple[str, bytes]]]:
    """split -> (class name, bytes) of what was written, in the order of bytes."""
    made = make(spec, out, SourceOptions(**options), samples_per_shard=7)
    found = {}
    for split in made["splits"]:
        classes = load_index(str(out / split)).classes
        found[split] = sorted((classes[label], data) for label, data in samples_of(out / split).values())
    return found


def expected(data: Rows, names: list[str] = CLASSES) -> list[tuple[str, bytes]]:
    cells = [cell["bytes"] if isinstance(cell, dict) else cell for cell in data["image"]]
    labels = [names[label] if isinstance(label, int) else label for label in data["label"]]
    return sorted(zip(labels, cells, strict=True))


@pytest.mark.parametrize("names", [
    ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"),
    ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"),
    ("default/train/0000.parquet", "default/train/0001.parquet", "default/val/0000.parquet"),
    ("test-data/train/a.parquet", "test-data/train/b.parquet", "test-data/valid/a.parquet"),
    ("photos_train_0.parquet", "photos_train_1.parquet", "photos_dev.parquet"),
])  # fmt: skip
def test_splits_are_told_by_file_and_folder_names_and_bytes_stay(tmp_path: Path, names: tuple[str, str, str]):
    parts = [rows(20), rows(11, 20), rows(9, 31)]
    for name, part in zip(names, parts, strict=True):
        parquet(tmp_path / "in" / name, part)
    found = packed(tmp_path / "in", tmp_path / "out")
    assert found["train"] == sorted(expected(parts[0]) + expected(parts[1]))
    assert found["val"] == expected(parts[2])
    assert load_index(str(tmp_path / "out/val")).classes == tuple(CLASSES)


def test_a_val_split_leaves_the_test_split_out_and_counts_it(tmp_path: Path):
    for name, part in (("train", rows(12)), ("validation", rows(6, 12)), ("test", rows(5, 18))):
        parquet(tmp_path / "in" / f"{name}-00000-of-00001.parquet", part)
    source = open_source(str(tmp_path / "in"), SourceOptions())
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 12, "val": 6}
    assert source.ignored == 5


@pytest.mark.parametrize("hidden", [-1, None])
def test_test_rows_without_published_labels_do_not_validate(tmp_path: Path, hidden: int | None):
    parquet(tmp_path / "in/train.parquet", rows(30))
    parquet(tmp_path / "in/test.parquet", rows(8) | {"label": [hidden] * 8})
    source = open_source(str(tmp_path / "in"), SourceOptions())
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 27, "val": 3}
    assert source.ignored == 8


@pytest.mark.parametrize("kind", [IMAGE, pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize("options", [{}, {"row_group_size": 3}, {"compression": "zstd"}])
def test_each_form_of_image_column_gives_the_same_samples(tmp_path: Path, kind: pa.DataType, options: dict[str, Any]):
    data = rows(25)
    cells = data["image"] if kind == IMAGE else [cell["bytes"] for cell in data["image"]]
    parquet(tmp_path / "photos.parquet", table(data | {"image": cells}, kind=kind), **options)
    found = packed(tmp_path / "photos.parquet", tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == expected(data)


@pytest.mark.parametrize(("labels", "names"), [
    (["zebra", "ant"] * 5, ["ant", "zebra"]),
    ([3, 0] * 5, ["0", "1", "2", "3"]),
    (pa.array(["b", "a"] * 5).dictionary_encode(), ["a", "b"]),
    (pa.array([1, 0] * 5, pa.uint8()), ["0", "1"]),
    (["10", "2"] * 5, [str(i) for i in range(11)]),
])  # fmt: skip
def test_labels_without_class_names_number_themselves(tmp_path: Path, labels: Any, names: list[str]):
    parquet(tmp_path / "x.parquet", pa.table({"img": pa.array([c["bytes"] for c in rows(10)["image"]]), "cls": labels}))
    source = open_source(str(tmp_path / "x.parquet"), SourceOptions())
    assert list(source.classes) == names
    items = source.splits["train"] + source.splits["val"]
    plain = labels.to_pylist() if isinstance(labels, pa.Array) else labels
    assert [names[i.label] for i in sorted(items)] == [str(label) for label in plain]


def test_columns_of_any_name_are_chosen_by_flag(tmp_path: Path):
    data = rows(12)
    parquet(tmp_path / "x.parquet", table({"photo": data["image"], "kind": data["label"], "label": [0] * 12}, None))
    done = make(tmp_path / "x.parquet", tmp_path / "out", SourceOptions(image_column="photo", label_column="kind"))
    assert done["splits"]["train"]["class_counts"] == [3, 3, 3]


def test_saved_data_sets_are_read_with_their_splits(tmp_path: Path):
    parts = {"train": rows(23), "validation": rows(10, 23), "test": rows(4, 33)}
    for name, part in parts.items():
        saved(tmp_path / "in" / name, part, 2)
    (tmp_path / "in/dataset_dict.json").write_text(json.dumps({"splits": list(parts)}))
    found = packed(tmp_path / "in", tmp_path / "out")
    assert found == {"train": expected(parts["train"]), "val": expected(parts["validation"])}


def test_a_single_saved_data_set_is_split_by_hash(tmp_path: Path):
    data = rows(40) | {"label": ["left", "right"] * 20}
    saved(tmp_path / "test", data, 3, None)
    found = packed(tmp_path / "test", tmp_path / "out", val_fraction=0.2)
    assert sorted(found["train"] + found["val"]) == expected(data)
    assert len(found["val"]) == 8


def test_images_that_lie_beside_the_table_are_read(tmp_path: Path):
    data = rows(6, classes=2)
    for cell in data["image"]:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / cell["path"]).write_bytes(cell["bytes"])
    cells = [{"bytes": None, "path": cell["path"]} for cell in data["image"]]
    parquet(tmp_path / "in/x.parquet", data | {"image": cells})
    found = packed(tmp_path / "in/x.parquet", tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == expected(data)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_rows_without_an_image_are_bad_images_by_name(tmp_path: Path, form: str):
    data = rows(12)
    data["image"][3], data["image"][5] = None, {"bytes": None, "path": "gone.jpg"}
    data["image"][7] = {"bytes": b"no image", "path": None}
    spec = parquet(tmp_path / "x.parquet", data) if form == "parquet" else saved(tmp_path / "x", data)
    with pytest.raises(DataError, match=r"3 images cannot be used.*(\n.*){3}\nWay out: mend") as error:
        make(spec, tmp_path / "out", SourceOptions(val_fraction=0))
    for number in (3, 5, 7):
        assert f"/{number:08d}: " in str(error.value)
    made = make(spec, tmp_path / "out", SourceOptions(val_fraction=0), on_bad="skip")
    assert made["splits"]["train"]["skipped"] == 3
    kept = {name: [values[i] for i in range(12) if i not in (3, 5, 7)] for name, values in data.items()}
    assert sorted(data for _, data in samples_of(tmp_path / "out/train").values()) == sorted(
        data for _, data in expected(kept)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": [0, None, 1, None]}, r"2 of 4 rows have no label:\n.*/00000001\n.*/00000003\nWay out"),
        ({"label": [0, 3, 1, 2]}, r"1 labels are outside 0..2 of the 3 class names:\n.*/00000001: 3"),
        ({"label": [0, -1, 1, 2]}, r"1 labels are outside 0..2"),
        ({"label": [[0], [1], [0], [1]]}, "label holds list values, must be integers or names"),
        ({"label": [0.5, 1.0, 0.0, 1.0]}, "label holds float values"),
        ({"image": ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]}, "images are string, must be binary"),
        ({"image": [[1], [2], [3], [4]]}, "images are list<.*>, must be binary"),
        ({"image": None}, "Way out: --image-column label"),
        ({"label": None}, "Way out: --label-column image"),
    ],
)
def test_what_does_not_fit_is_named_with_a_way_out(tmp_path: Path, change: Rows, message: str):
    data = {name: values for name, values in (rows(4) | change).items() if values is not None}
    parquet(tmp_path / "x.parquet", table(data, kind=None if "image" in change else IMAGE))
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / "x.parquet"), SourceOptions())


def test_negative_numbers_without_class_names_are_no_classes(tmp_path: Path):
    parquet(tmp_path / "x.parquet", table(rows(4) | {"label": [-1, 0, 10, 2]}, None))
    with pytest.raises(DataError, match="1 labels are below 0"):
        open_source(str(tmp_path / "x.parquet"), SourceOptions())


def test_files_of_other_data_sets_are_not_mixed_in(tmp_path: Path):
    parquet(tmp_path / "in/train-0.parquet", rows(4))
    parquet(tmp_path / "in/train-1.parquet", table(rows(4), ["a", "b", "c"]))
    with pytest.raises(DataError, match=r"train-1.*other class names than .*train-0"):
        open_source(str(tmp_path / "in"), SourceOptions())
    parquet(tmp_path / "in/train-1.parquet", {"image": rows(4)["image"], "tag": [0] * 4})
    with pytest.raises(DataError, match=r"train-1.*no such column"):
        open_source(str(tmp_path / "in"), SourceOptions())


def test_a_wrong_flag_ends_with_code_42_and_the_nearest_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parquet(tmp_path / "x.parquet", rows(4))
    flags = ["shards", "make", str(tmp_path / "x.parquet"), str(tmp_path / "out"), "--label-column", "labe1"]
    assert main(flags) == EXIT_USER
    assert "did you mean 'label'" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path: Path, damage: str):
    path = parquet(tmp_path / "x.parquet", rows(50), write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "empty": b"", "foreign": b"x" * 999}[damage])
    with pytest.raises(DataError, match=r"x\.parquet.*Way out: "):
        open_source(str(path), SourceOptions())


@pytest.mark.parametrize("damage", ["cut", "empty", "state", "missing"])
def test_a_damaged_saved_data_set_is_an_error_that_names_it(tmp_path: Path, damage: str):
    folder = saved(tmp_path / "in", rows(50))
    file = folder / "data-00000-of-00001.arrow"
    if damage == "state":
        (folder / "state.json").write_text('{"_data_files": ')
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 5000 if damage == "cut" else 0])
    with pytest.raises(DataError, match=r"/in.*Way out: "):
        open_source(str(folder), SourceOptions())


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_one_or_two_processes_write_the_same_bytes_each_time(tmp_path: Path):
    spec = parquet(tmp_path / "x.parquet", rows(60), row_group_size=7)
    trees = []
    for i, workers in enumerate((1, 2, 1)):
        make(spec, tmp_path / str(i), samples_per_shard=5, workers=workers)
        trees.append(tree(tmp_path / str(i)))
    assert trees[0] == trees[1] == trees[2]
    assert {"train/shards.json", "val/shards.json"} < trees[0].keys()
    assert not any("images" in name or "scratch" in name for name in trees[0])


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_killed_packing_goes_on_with_the_shards_it_finished(tmp_path: Path, form: str):
    data = rows(90)
    spec = parquet(tmp_path / "x.parquet", data) if form == "parquet" else saved(tmp_path / "x", data)
    make(spec, tmp_path / "whole", samples_per_shard=2)
    out = tmp_path / "killed"
    flags = ["--samples-per-shard", "2", "--no-crop-ready", "--workers", "1"]
    command = [sys.executable, "-m", "orchestrator.cli.main", "shards", "make", str(spec), str(out), *flags]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True)
    limit = time.monotonic() + 60
    while len(list(out.glob("train/*.tar"))) < 4:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "train/shards.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in list(out.glob("train/*.idx"))[:-1]}
    make(spec, out, samples_per_shard=2)
    assert tree(out) == tree(tmp_path / "whole")
    assert sum(path.stat().st_mtime_ns == time for path, time in kept.items()) >= len(kept) - 1 > 0


def test_a_dry_run_counts_rows_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parquet(tmp_path / "in/train.parquet", rows(30))
    flags = ["--samples-per-shard", "9", "--dry-run", "--json"]
    assert main(["shards", "make", str(tmp_path / "in"), str(tmp_path / "out"), *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["splits"] == {"train": {"samples": 27, "shards": 3}, "val": {"samples": 3, "shards": 1}}
    assert (plan["name"], plan["classes"]) == ("in", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


MEASURE = """
import re, sys
from pathlib import Path
from orchestrator.data.sources import SourceOptions, open_source

def most():  # getrusage would count the parent's memory before exec
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

open_source(sys.argv[1], SourceOptions())
before = most()
source = open_source(sys.argv[2], SourceOptions(scratch=Path(sys.argv[3])))
assert sum(item.size for items in source.splits.values() for item in items) > 150 << 20
print(most() - before)
"""


@pytest.mark.parametrize("options", [{"row_group_size": 4}, {"write_batch_size": 2}], ids=["row groups", "pages"])
def test_a_parquet_file_is_read_in_parts_as_small_as_it_has_them(tmp_path: Path, options: dict[str, int]):
    """160 MiB, in small row groups or in one with small pages, cost under 100; pyarrow's defaults cost over 300."""
    small = parquet(tmp_path / "small.parquet", rows(300))
    cells = [{"bytes": os.urandom(2 << 20), "path": None}] * 80
    data = {"image": cells, "label": [0, 1] * 40}
    large = parquet(tmp_path / "large.parquet", data, compression="none", use_dictionary=False, **options)
    command = [sys.executable, "-c", MEASURE, str(small), str(large), str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 << 10


def test_folders_of_images_are_not_taken_for_tables(tmp_path: Path):
    (tmp_path / "in/train/cat").mkdir(parents=True)
    (tmp_path / "in/train/cat/1.jpg").write_bytes(image(1))
    parquet(tmp_path / "in/train/dog/metadata.parquet", rows(2))
    parquet(tmp_path / "hidden/.cache/x.parquet", rows(2))
    assert not is_table_source(tmp_path / "in")
    assert not is_table_source(tmp_path / "hidden")
    parquet(tmp_path / "hidden/data/x.parquet", rows(2))
    assert is_table_source(tmp_path / "hidden")
