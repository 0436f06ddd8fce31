"""Data sets of Hugging Face as `datasets` itself writes them, columns told by their types, and Arrow files in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from orchestrator.data.index import load_index
from orchestrator.data.sources import SourceOptions, open_source
from orchestrator.errors import DataError
from tests.data.test_tables import CLASSES, IMAGE, expected, packed, parquet, rows, saved
from tests.data.test_writer import make


def features_of(columns: dict[str, Any]) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


def unusual(images: list[str], labels: list[str]) -> pa.Table:
    """Columns of these names, beside one of numbers, with their types in the metadata."""
    data = rows(20)
    columns: dict[str, Any] = {"number": list(range(20))}
    columns |= {name: pa.array(data["image"], IMAGE) for name in images} | dict.fromkeys(labels, data["label"])
    kinds: dict[str, Any] = {name: {"_type": "Image"} for name in images}
    kinds |= {name: {"_type": "ClassLabel", "names": CLASSES} for name in labels}
    return pa.table(columns).replace_schema_metadata(features_of(kinds))


def test_columns_of_unusual_names_are_told_by_their_types(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", unusual(["photo"], ["species"]))
    found = packed(path, tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == expected(rows(20))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (["front", "back"], ["label"], r"2 columns may be it, columns are number, front, back, label.*--image-column"),
        (["image"], ["species", "genus"], r"2 columns may be it.*--label-column number\|image\|species\|genus"),
        ([], ["label"], r"no column has a usual name, columns are number, label.*--image-column"),
    ],
)
def test_columns_that_could_be_either_are_the_users_to_choose(
    tmp_path: Path, images: list[str], labels: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_source(str(parquet(tmp_path / "x.parquet", unusual(images, labels))), SourceOptions())


def test_a_pattern_names_the_files_that_are_read(tmp_path: Path) -> None:
    for i, name in enumerate(("a/train-0", "a/train-1", "a/val-0", "a/notes", "b/train-0")):
        parquet(tmp_path / "in" / f"{name}.parquet", rows(10, 10 * i))
    found = packed(tmp_path / "in/a/*-?.parquet", tmp_path / "out")
    assert found == {"train": expected(rows(20)), "val": expected(rows(10, 20))}
    with pytest.raises(DataError, match=r"no file there.*Way out"):
        open_source(str(tmp_path / "in/c/*.parquet"), SourceOptions())


@pytest.mark.parametrize(("form", "laid_out"), [("arrow", False), ("parquet", True)])
def test_images_of_arrow_files_are_read_where_they_lie(tmp_path: Path, form: str, laid_out: bool) -> None:
    data = rows(20)
    write: dict[str, Callable[[], Path]] = {
        "arrow": lambda: saved(tmp_path / "in", data, 2),
        "parquet": lambda: parquet(tmp_path / "x.parquet", data),
    }
    path = write[form]()
    (tmp_path / "scratch").mkdir()
    source = open_source(str(path), SourceOptions(scratch=tmp_path / "scratch"))
    read = sorted((CLASSES[i.label], source.read(i.ref)) for items in source.splits.values() for i in items)
    assert read == expected(data)
    size = sum(len(content) for _, content in read)
    assert (tmp_path / "scratch/images").stat().st_size == (size if laid_out else 0)


def test_rows_chosen_by_indices_beside_the_data_are_not_taken_for_all(tmp_path: Path) -> None:
    folder = saved(tmp_path / "in", rows(10))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match=r"flatten_indices"):
        open_source(str(folder), SourceOptions())


def save_to_disk(made: Any, folder: Path) -> Path:
    made.save_to_disk(str(folder), num_shards={"train": 2, "validation": 1, "test": 1})
    return folder


def to_parquet(made: Any, folder: Path) -> Path:
    for split, part in made.items():
        part.to_parquet(str(folder / f"data/{split}-00000-of-00001.parquet"), batch_size=7)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [save_to_disk, to_parquet])
def test_what_datasets_writes_becomes_shards_with_names_splits_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Any, Path], Path]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    parts = {"train": rows(30), "validation": rows(9, 30), "test": rows(6, 39)}
    made = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(data, features=kinds).shuffle(seed=1) for split, data in parts.items()}
    )
    (tmp_path / "in/data").mkdir(parents=True)
    path = write(made, tmp_path / "in")
    found = packed(path, tmp_path / "out")
    assert found == {"train": expected(parts["train"]), "val": expected(parts["validation"])}
    assert load_index(str(tmp_path / "out/train")).classes == tuple(CLASSES)
    assert make(path, tmp_path / "again")["ignored_files"] == 6
