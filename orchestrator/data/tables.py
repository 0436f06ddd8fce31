"""Images in tables: parquet files and Hugging Face data sets on disk (`save_to_disk`), a row an image.

Row groups are compressed together, so a row cannot be read alone: the images are laid out once in one file beside the
shards that are being made, as compressed archives are, and packed from there.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.data.cells import CellReader, Layout, count_rows, holds_images, read_cells, read_schema
from orchestrator.data.folders import VAL_FRACTION, number_labels
from orchestrator.data.images import SUFFIXES
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
HIDDEN = -1
"""The label of test rows whose true one is not published; others leave it null."""


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
    """Whether a path is a parquet file, holds some, is a pattern of some, or is a data set saved to disk."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("state.json", "dataset_dict.json")) or _has_parquet(path)
    return path.suffix == ".parquet" and (path.is_file() or glob.has_magic(str(path)))


def _has_parquet(root: Path) -> bool:
    """The first folder that holds either images or parquet files decides: a tree of images is not walked."""
    for _, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        suffixes = {os.path.splitext(name)[1].lower() for name in files if not name.startswith(".")}
        if ".parquet" in suffixes or suffixes.intersection(SUFFIXES):
            return ".parquet" in suffixes
    return False


def open_tables(path: Path, options: SourceOptions) -> Source:
    """Every row of the training files; validation rows are those of a val split, else of a test split, else by hash.

    Raises DataError for missing columns, labels that are no class, and files that cannot be read.
    """
    tables, unused = _find_tables(path)
    columns = _choose_columns(path, tables, options)
    items: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    with Layout(options.scratch / "images" if options.scratch else None) as layout:
        found = [(table.split, *_read(table, columns, layout)) for table in tables]
    number = sum(len(labels) for _, labels, _ in found)
    found = [_without_hidden(*one) if one[0] == "test" else one for one in found]
    labels = [label for _, some, _ in found for label in some]
    classes, numbers = _number(path, columns, labels, [item.name for _, _, some in found for item in some])
    for split, _, some in found:
        items[split] += [item._replace(label=next(numbers)) for item in some]
    splits = {"train": items["train"], "val": items["val"] or items["test"]}
    if not splits["val"]:
        fraction = VAL_FRACTION if options.val_fraction is None else options.val_fraction
        splits = split_by_hash(splits["train"], fraction, options.seed)
    ignored = number - len(labels) + sum(map(_count_rows, unused))
    return Source(_name_of(path), classes, splits, CellReader(tuple(layout.paths)), ignored)


def _name_of(path: Path) -> str:
    whole = path.resolve()
    return whole.name if whole.is_dir() else whole.stem if whole.is_file() else whole.parent.name


def _find_tables(path: Path) -> tuple[list[Table], list[Table]]:
    """The files that are read, and those of a test split that has a val split beside it."""
    tables = _list_tables(path)
    if not tables:
        raise DataError(f"{path}: no file there. Way out: a pattern of parquet files that exist")
    if not any(table.split == "val" for table in tables):
        return tables, []
    return [t for t in tables if t.split != "test"], [t for t in tables if t.split == "test"]


def _list_tables(path: Path) -> list[Table]:
    if path.is_file():
        return [Table(path, path.stem, _split_of(path.stem), False)]
    if (path / "dataset_dict.json").is_file():
        splits = _read_json(path / "dataset_dict.json", "splits")
        return [table for split in splits for table in _saved(path / split, _split_of(split))]
    if (path / "state.json").is_file():
        return _saved(path, "train")
    files = sorted(path.rglob("*.parquet") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True)))
    folder = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files] or ["."]))
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    return [Table(file, name, _split_of(name), False) for file, name in zip(files, names, strict=True)]


def _saved(folder: Path, split: str) -> list[Table]:
    if _read_json(folder / "state.json").get("_indices_data_files"):
        raise DataError(
            f"{folder}: rows are chosen by indices beside it. Way out: save it anew after `.flatten_indices()`"
        )
    paths = [folder / entry["filename"] for entry in _read_json(folder / "state.json", "_data_files")]
    return [Table(path, f"{folder.name}/{path.stem}", split, True) for path in paths]


def _read_json(path: Path, key: str | None = None) -> Any:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return body if key is None else body[key]
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: not what save_to_disk writes ({error!r}). Way out: save the data set anew") from error


def _split_of(name: str) -> str:
    """By the file's own name, else by its folders', the nearest first."""
    for part in reversed(name.lower().split("/")):
        for split, word in SPLITS.items():
            if word.search(part):
                return split
    return "train"


def _count_rows(table: Table) -> int:
    return count_rows(table.path, table.is_arrow)


def _choose_columns(path: Path, tables: list[Table], options: SourceOptions) -> Columns:
    """From the first file; all others must have these columns and class names too."""
    columns = _columns_of(path, read_schema(tables[0].path, tables[0].is_arrow), options)
    chosen = replace(options, image_column=columns.image, label_column=columns.label)
    others = (t for t in tables[1:] if _columns_of(t.path, read_schema(t.path, t.is_arrow), chosen) != columns)
    if (other := next(others, None)) is not None:
        raise DataError(
            f"{other.path}: other class names than {tables[0].path}. Way out: name the files of one data set, "
            f"e.g. '{path}/*/train*.parquet'"
        )
    return columns


def _columns_of(path: Path, schema: Any, options: SourceOptions) -> Columns:
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    images = [name for name in schema.names if holds_images(schema.field(name).type)]
    labels = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    usual = [name for name in IMAGE_COLUMNS if name in schema.names]
    image = _choose(path, ("--image-column", options.image_column), (usual, images), schema.names)
    usual = [name for name in LABEL_COLUMNS if name in schema.names]
    label = _choose(path, ("--label-column", options.label_column), (usual, labels), schema.names)
    names = features.get(label, {}).get("names") if label in labels else None
    return Columns(image, label, tuple(map(str, names)) if names else None)


def _choose(
    path: Path, option: tuple[str, str | None], candidates: tuple[list[str], list[str]], present: list[str]
) -> str:
    """The column named by the option, else the first with a usual name, else the only one of the right type."""
    flag, wanted = option
    usual, of_type = candidates
    if wanted is not None and wanted not in present:
        raise DataError(f"{flag} = {wanted}: {path} has no such column; {nearest(wanted, present)}")
    if wanted or usual:
        return wanted or usual[0]
    if len(of_type) != 1:
        what = f"{len(of_type)} columns may be it" if of_type else "no column has a usual name"
        raise DataError(f"{path}: {what}, columns are {', '.join(present)}. Way out: {flag} {'|'.join(present)}")
    return of_type[0]


def _read(table: Table, columns: Columns, layout: Layout) -> tuple[list[Any], list[Item]]:
    """Labels as they stand there, and items that have no number yet."""
    stat = table.path.stat()
    stamp = f"{stat.st_size}:{stat.st_mtime_ns}"
    labels: list[Any] = []
    items: list[Item] = []
    for cells in read_cells(table.path, table.is_arrow, (columns.image, columns.label), layout):
        for row, (offset, size) in enumerate(zip(cells.offsets.tolist(), cells.sizes.tolist(), strict=True)):
            ref = cells.elsewhere.get(row, (cells.number, offset, size))
            items.append(Item(f"{table.name}/{len(items):08d}", HIDDEN, ref, size, stamp))
        labels += cells.labels
    return labels, items


def _without_hidden(split: str, labels: list[Any], items: list[Item]) -> tuple[str, list[Any], list[Item]]:
    kept = [(label, item) for label, item in zip(labels, items, strict=True) if label not in (HIDDEN, None)]
    return split, [label for label, _ in kept], [item for _, item in kept]


def _number(path: Path, columns: Columns, labels: list[Any], names: list[str]) -> tuple[tuple[str, ...], Iterator[int]]:
    """Class names, and a class number for each label. Raises DataError for rows without one and for impossible ones."""
    missing = [name for name, label in zip(names, labels, strict=True) if label is None]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(names)} rows have no {columns.label}:\n{list_first(missing)}\n"
            "Way out: leave these rows out, or --label-column"
        )
    strange = {type(label).__name__ for label in labels} - {"int", "str", "bool"}
    if strange:
        raise DataError(
            f"{path}: {columns.label} holds {', '.join(sorted(strange))} values, must be integers or names. "
            "Way out: --label-column, or cast the column"
        )
    _require_inside(path, columns, labels, names)
    if columns.names is None:
        classes, numbers = number_labels(path, [str(label) for label in labels])
        return classes, iter(numbers)
    return columns.names, iter(labels)


def _require_inside(path: Path, columns: Columns, labels: list[Any], names: list[str]) -> None:
    top = len(columns.names) - 1 if columns.names else math.inf
    numbers = zip(names, labels, strict=True)
    outside = [f"{name}: {label}" for name, label in numbers if isinstance(label, int) and not 0 <= label <= top]
    if outside:
        rule = f"outside 0..{top} of the {top + 1} class names" if columns.names else "below 0"
        raise DataError(f"{path}: {len(outside)} labels are {rule}:\n{list_first(outside)}\nWay out: --label-column")
