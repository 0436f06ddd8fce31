"""Where labelled images come from: one form for folders, archives, manifests and data sets."""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.errors import ConfigError, DataError, nearest

BUILT_IN = ("digits", "synthetic")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
TORCHVISION = "torchvision:"
ENTRY_POINTS = "orchestrator.datasets"


class Item(NamedTuple):
    """One labelled image that has not been read yet."""

    name: str  # unique within its split
    label: int
    ref: Any  # what the source's reader needs to find it
    size: int  # encoded bytes, exact or estimated: decides where shards are cut
    stamp: str  # changes when the image may have changed


Read = Callable[[Any], Any]
"""ref -> encoded bytes or pixels (H, W, 3) / (H, W) uint8; runs in packing processes. Raises OSError, ImageError."""


@dataclass(frozen=True, slots=True)
class Source:
    """Class names in the order of their labels, and the items of each split."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[Item]]
    read: Read
    ignored: int = 0  # files that are not images or lie in no class folder


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """What a source may need besides its name."""

    val_fraction: float | None = None
    seed: int = 0
    samples: int = 1000
    classes: int = 10
    size: int = 32
    root: str = "data"
    download: bool = False
    image_column: str | None = None
    label_column: str | None = None
    scratch: Path | None = None
    """Where a compressed archive is unpacked for random access; None only lists it."""

    def __post_init__(self) -> None:
        require_flags(
            ("--val-fraction", self.val_fraction, 0, 0.9),
            ("--samples", self.samples, 2, 1 << 40),
            ("--classes", self.classes, 2, 1_000_000),
            ("--size", self.size, 1, 8192),
        )


def require_flags(*bounds: tuple[str, float | None, float, float]) -> None:
    """Each (flag, value, low, high) lies within its closed bounds, or is not given."""
    for flag, value, low, high in bounds:
        if value is not None and not low <= value <= high:
            rule = f"must be between {low:,} and {high:,}"
            raise ConfigError(flag, value, rule, f"{flag} {min(max(value, low), high)}")


def open_source(spec: str, options: SourceOptions) -> Source:
    """Find out what `spec` names and list its items.

    Raises DataError for an unknown name and for what holds no labelled images.
    """
    try:
        source = _dispatch(spec, options)
    except (PermissionError, FileNotFoundError, UnicodeError, csv.Error) as error:
        raise DataError(
            f"{spec}: cannot be read ({error}). Way out: check its encoding and that you may read it"
        ) from error
    if not source.splits.get("train"):
        raise DataError(f"{spec}: no training image. Way out: name a folder with class folders of images")
    if len(source.classes) < 2:
        only = ", ".join(source.classes)
        raise DataError(
            f"{spec}: one class ({only}), must be at least 2. Way out: name the folder above the class folders"
        )
    return source


def _dispatch(spec: str, options: SourceOptions) -> Source:
    from orchestrator.data import datasets, folders, tables

    path = Path(spec).expanduser()
    if spec == "digits":
        return datasets.open_digits()
    if spec == "synthetic":
        return datasets.open_synthetic(options)
    if spec.startswith(TORCHVISION):
        return datasets.open_torchvision(spec.removeprefix(TORCHVISION), options)
    if spec in datasets.entry_point_names():
        return datasets.open_entry_point(spec, options)
    if tables.is_table_source(path):
        return tables.open_tables(path, options)
    if path.is_dir():
        return folders.open_folder(path, options)
    if path.is_file() and path.suffix == ".csv":
        return folders.open_manifest(path, options)
    if path.is_file() and spec.endswith(ARCHIVES):
        return folders.open_archive(path, options)
    raise _unknown(spec, path, datasets.entry_point_names())


def _unknown(spec: str, path: Path, entry_points: Iterable[str]) -> DataError:
    if path.exists():
        known = ", ".join((".csv", ".parquet", *ARCHIVES))
        return DataError(
            f"{spec}: neither a folder, a manifest nor an archive. Way out: a folder, or a file of {known}"
        )
    siblings = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(spec, [*BUILT_IN, *entry_points, *siblings])
    return DataError(
        f"{spec}: no such file, folder or data set; {hint} Way out: a folder with class folders, .csv, .parquet, "
        f"an archive, {', '.join(BUILT_IN)}, {TORCHVISION}NAME or an entry point of {ENTRY_POINTS}"
    )


def split_by_hash(items: Sequence[Item], fraction: float, seed: int) -> dict[str, list[Item]]:
    """Cut off the same share of every class for validation, by a hash of each name: the listing's order has no say.

    Every class with two images or more has at least one in each split.
    """
    by_label: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        by_label[item.label].append(item)
    train, val = [], []
    for label in sorted(by_label):
        ranked = sorted(by_label[label], key=lambda item: name_hash(seed, "split", item.name))
        number = min(max(round(len(ranked) * fraction), 1), len(ranked) - 1) if fraction > 0 else 0
        val += ranked[:number]
        train += ranked[number:]
    return {"train": train, "val": val}


def name_hash(seed: int, purpose: str, name: str) -> bytes:
    """A rank for `name` that depends on nothing but its arguments."""
    return hashlib.blake2b(f"{seed}\0{purpose}\0{name}".encode("utf-8", "surrogateescape"), digest_size=16).digest()
