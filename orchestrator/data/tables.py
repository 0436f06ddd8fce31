"""Images in tables: parquet files and Hugging Face data sets on disk (`save_to_disk`), a row an image.

Row groups are compressed together, so a row cannot be read alone: the images are laid out once in one file beside the
shards that are being made, as compressed archives are, and packed from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.folders import VAL_FRACTION, RangeReader, number_labels
from orchestrator.data.members import list_first
from orchestrator.data.sources import Item, Source, SourceOptions, split_by_hash
from orchestrator.errors import DataError, nearest

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "cls", "fine_label", "class", "target")
SPLITS = {
    "train": re.compile(r"(?<![a-z])train(ing)?(?![a-z])"),
    "val": re.compile(r"(?<![a-z])(val|valid|validation|dev)(?![a-z])"),
    "test": re.compile(r"(?<![a-z])(test|testing|eval|evaluation)(?![a-z])"),
}
"""Words of file and folder names that name a split, as the Hugging Face hub takes them."""
ROWS_AT_ONCE = 256
HIDDEN = -1
"""The label of test rows whose true one is not published."""


@dataclass(frozen=True, slots=True)
class Table:
    """One file of rows."""

    path: Path
    name: str
    split: str  # train, val or test
    is_arrow: bool


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns are read, and the class names where the file's own metadata have them."""

    image: str
    label: str
    names: tuple[str, ...] | None


def is_table_source(path: Path) -> bool:
    """Whether a path is a parquet file, holds some, or is a data set saved to disk."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("state.json", "dataset_dict.json")) or _has_parquet(path)
    return path.suffix == ".parquet" and path.is_file()


def _has_parquet(path: Path) -> bool:
    return next(path.rglob("*.parquet"), None) is not None and not any(path.glob("*/*.jp*g"))


def open_tables(path: Path, options: SourceOptions) -> Source:
    """Every row of every file; validation rows are those of a val split, else of a test split, else cut off by hash.

    Raises DataError for missing columns, labels that are no class, and files that cannot be read.
    """
    import pyarrow as pa

    tables = _find_tables(path)
    try:
        columns = _choose_columns(path, tables[0], options)
        rows = _lay_out(tables, columns, options.scratch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as tables ({error}). Way out: download these files again") from error
    classes, splits = _arrange(path, columns, rows)
    if not splits["val"]:
        fraction = VAL_FRACTION if options.val_fraction is None else options.val_fraction
        splits = split_by_hash(splits["train"], fraction, options.seed)
    where = options.scratch / "images" if options.scratch else path
    return Source(path.stem, classes, splits, RangeReader(str(where)))


def _find_tables(path: Path) -> list[Table]:
    if path.is_file():
        return [Table(path, path.stem, _split_of(path.stem), False)]
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return [table for split in splits for table in _saved(path / split, _split_of(split))]
    if (path / "state.json").is_file():
        return _saved(path, "train")
    files = sorted(path.rglob("*.parquet"))
    names = [file.relative_to(path).with_suffix("").as_posix() for file in files]
    return [Table(file, name, _split_of(name), False) for file, name in zip(files, names, strict=True)]


def _saved(folder: Path, split: str) -> list[Table]:
    files = json.loads((folder / "state.json").read_text())["_data_files"]
    paths = [folder / entry["filename"] for entry in files]
    return [Table(path, f"{folder.name}/{path.stem}", split, True) for path in paths]


def _split_of(name: str) -> str:
    found = [split for split, word in SPLITS.items() if word.search(name.lower())]
    return found[-1] if found else "train"


def _choose_columns(path: Path, table: Table, options: SourceOptions) -> Columns:
    with ExitStack() as opened:
        schema = _open(table, opened)[0]
    image = _choose(path, "--image-column", options.image_column, IMAGE_COLUMNS, schema.names)
    label = _choose(path, "--label-column", options.label_column, LABEL_COLUMNS, schema.names)
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(label, {})
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return Columns(image, label, tuple(map(str, names)) if names else None)


def _choose(path: Path, flag: str, wanted: str | None, usual: tuple[str, ...], present: list[str]) -> str:
    if wanted is not None and wanted not in present:
        raise DataError(f"{flag} = {wanted}: {path} has no such column; {nearest(wanted, present)}")
    found = [wanted] if wanted else [name for name in usual if name in present]
    if not found:
        raise DataError(f"{path}: none of {', '.join(usual)} among its columns. Way out: {flag} {'|'.join(present)}")
    return found[0]


def _open(table: Table, opened: ExitStack) -> tuple[Any, Iterator[Any]]:
    """Schema and record batches of a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not table.is_arrow:
        file = opened.enter_context(pq.ParquetFile(table.path))
        return file.schema_arrow, file.iter_batches(batch_size=ROWS_AT_ONCE)
    stream = opened.enter_context(pa.ipc.open_stream(opened.enter_context(pa.memory_map(str(table.path)))))
    return stream.schema, iter(stream)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its label as it stands there, and where its image lies."""

    name: str
    split: str
    label: Any
    ref: tuple[int, int]
    stamp: str


def _lay_out(tables: list[Table], columns: Columns, scratch: Path | None) -> list[Row]:
    """Read all tables once; the images go one after the other into one file, without `scratch` nowhere."""
    rows, at = [], 0
    with ExitStack() as opened:
        target = opened.enter_context((scratch / "images").open("wb")) if scratch else None
        for table in tables:
            stat = table.path.stat()
            batches = _open(table, opened)[1]
            number = 0
            for batch in batches:
                labels = batch.column(columns.label).to_pylist()
                for label, image in zip(labels, batch.column(columns.image), strict=True):
                    data = _image_bytes(image, table)
                    if target is not None:
                        target.write(data)
                    name = f"{table.name}/{number:08d}"
                    rows.append(Row(name, table.split, label, (at, len(data)), f"{stat.st_size}:{stat.st_mtime_ns}"))
                    at, number = at + len(data), number + 1
    return rows


def _image_bytes(value: Any, table: Table) -> bytes:
    """The encoded image of a cell: binary, or Hugging Face's struct of `bytes` and `path`; nothing where it is null."""
    cell = value.as_py()
    if isinstance(cell, dict):
        data, path = cell.get("bytes"), cell.get("path")
        if data is None and path:
            return (table.path.parent / path).read_bytes()
        cell = data
    if cell is None:
        return b""
    if not isinstance(cell, bytes):
        raise DataError(
            f"{table.path}: images are {value.type}, must be binary or a struct of bytes and path. "
            "Way out: --image-column, or cast the column to datasets.Image()"
        )
    return cell


def _arrange(path: Path, columns: Columns, rows: list[Row]) -> tuple[tuple[str, ...], dict[str, list[Item]]]:
    missing = [row.name for row in rows if row.label is None]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(rows)} rows have no {columns.label}:\n{list_first(missing)}\n"
            "Way out: leave these rows out, or --label-column"
        )
    rows = [row for row in rows if row.split != "test" or row.label != HIDDEN]
    classes, numbers = _number(path, columns, rows)
    used = {row.split for row in rows}
    val = "val" if "val" in used else "test"
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    for row, number in zip(rows, numbers, strict=True):
        item = Item(row.name, number, row.ref, row.ref[1], f"{row.stamp}:{row.name}")
        if row.split == "train":
            splits["train"].append(item)
        elif row.split == val:
            splits["val"].append(item)
    return classes, splits


def _number(path: Path, columns: Columns, rows: list[Row]) -> tuple[tuple[str, ...], list[int]]:
    if columns.names is None:
        return number_labels(path, [str(row.label) for row in rows])
    outside = [f"{row.name}: {row.label}" for row in rows if not 0 <= row.label < len(columns.names)]
    if outside:
        raise DataError(
            f"{path}: {len(outside)} labels are outside 0..{len(columns.names) - 1} of the {len(columns.names)} class "
            f"names:\n{list_first(outside)}\nWay out: --label-column"
        )
    return columns.names, [row.label for row in rows]
