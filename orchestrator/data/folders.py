"""Class folders on disk or in an archive, and CSV manifests."""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from orchestrator.data.images import SUFFIXES, ImageError
from orchestrator.data.members import list_first
from orchestrator.data.sources import Item, Source, SourceOptions, split_by_hash
from orchestrator.errors import DataError

VAL_FRACTION = 0.1
VAL_NAMES = ("val", "validation", "valid", "test")
MOST_CLASSES = 1_000_000
_OPENERS = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class Entry(NamedTuple):
    """A file of a listing, by its path from the root, with forward slashes."""

    path: str
    ref: Any
    size: int
    stamp: str


@dataclass(frozen=True, slots=True)
class FileReader:
    """Whole files under a root."""

    root: str

    def __call__(self, ref: str) -> bytes:
        return Path(self.root, ref).read_bytes()


@dataclass(frozen=True, slots=True)
class RangeReader:
    """Byte ranges (offset, size) of one uncompressed tar."""

    path: str

    def __call__(self, ref: tuple[int, int]) -> bytes:
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), ref[1], ref[0])


@dataclass(frozen=True, slots=True)
class ZipReader:
    """Members of a zip by name."""

    path: str

    def __call__(self, ref: str) -> bytes:
        try:
            return _open_zip(self.path).read(ref)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
            raise ImageError(f"cannot be unpacked ({error})") from error


@lru_cache(maxsize=1)
def _open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def open_folder(root: Path, options: SourceOptions) -> Source:
    """ROOT/CLASS/*, or ROOT/train/CLASS/* and ROOT/val/CLASS/*; links are followed."""
    return _arrange(root.resolve().name, list(_walk(root)), FileReader(str(root.resolve())), options)


def _walk(root: Path) -> Iterator[Entry]:
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            stat = path.stat() if path.exists() else path.lstat()
            yield Entry(relative, relative, stat.st_size, f"{stat.st_size}:{stat.st_mtime_ns}")


def open_archive(path: Path, options: SourceOptions) -> Source:
    """Class folders inside a tar or zip; a compressed tar is unpacked once into `options.scratch`, others stay shut."""
    name = path.name.split(".")[0]
    stat = path.stat()
    stamp = f"{stat.st_size}:{stat.st_mtime_ns}"
    try:
        if path.suffix == ".zip":
            return _arrange(name, _list_zip(path, stamp), ZipReader(str(path.resolve())), options)
        if path.suffix in _OPENERS and options.scratch:
            path = _unpack(path, options.scratch)
        return _arrange(name, _list_tar(path, stamp), RangeReader(str(path.resolve())), options)
    except _DAMAGE as error:
        raise DataError(f"{path}: damaged archive ({error}). Way out: copy or download it again") from error


def _unpack(path: Path, scratch: Path) -> Path:
    target = scratch / "source.tar"
    with _OPENERS[path.suffix](path, "rb") as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    return target


def _list_tar(path: Path, stamp: str) -> list[Entry]:
    with tarfile.open(path, "r:*") as tar:
        return [
            Entry(info.name, (info.offset_data, info.size), info.size, f"{stamp}:{info.offset_data}")
            for info in tar
            if info.isreg()
        ]


def _list_zip(path: Path, stamp: str) -> list[Entry]:
    with zipfile.ZipFile(path) as file:
        return [
            Entry(info.filename, info.filename, info.file_size, f"{stamp}:{info.header_offset}")
            for info in file.infolist()
            if not info.is_dir()
        ]


def _arrange(name: str, entries: list[Entry], read: Any, options: SourceOptions) -> Source:
    """Tell splits and classes from the paths."""
    images = {_parts(e.path): e for e in entries if _is_image(e.path)}
    if not images:
        raise DataError(
            f"{name}: no image among {len(entries)} files. Way out: files named {', '.join(SUFFIXES)} in class folders"
        )
    images = _without_common_folder(images)
    train, val = _split_folders(images)
    classes = tuple(sorted({parts[0] for parts in train if len(parts) > 1}))
    if not classes:
        raise DataError(
            f"{name}: {len(images)} images but no class folders. Way out: CLASS/image.jpg, one folder per class"
        )
    _require_known_classes(name, classes, val)
    splits = {"train": _items(train, classes), "val": _items(val, classes)}
    used = sum(map(len, splits.values()))
    if not val:
        splits = split_by_hash(splits["train"], _fraction(options), options.seed)
    return Source(name, classes, splits, read, len(entries) - used)


def _fraction(options: SourceOptions) -> float:
    return VAL_FRACTION if options.val_fraction is None else options.val_fraction


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(path).parts if part not in (".", "/"))


def _is_image(path: str) -> bool:
    """macOS archives carry a `._photo.jpg` of metadata for each photo; hidden files are no images."""
    pure = PurePosixPath(path)
    return pure.suffix.lower() in SUFFIXES and not pure.name.startswith(".") and "__MACOSX" not in pure.parts


Tree = dict[tuple[str, ...], Entry]


def _without_common_folder(images: Tree) -> Tree:
    while len({parts[0] for parts in images}) == 1 and all(len(parts) > 2 for parts in images):
        images = {parts[1:]: entry for parts, entry in images.items()}
    return images


def _split_folders(images: Tree) -> tuple[Tree, Tree]:
    """Training and validation images by the name of their first folder; all are training images without such names."""
    first = {parts[0] for parts in images}
    if "train" not in first:
        return images, {}
    val_name = next((name for name in VAL_NAMES if name in first), None)
    return _below("train", images), _below(val_name, images)


def _below(folder: str | None, images: Tree) -> Tree:
    return {parts[1:]: entry for parts, entry in images.items() if parts[0] == folder and len(parts) > 1}


def _require_known_classes(name: str, classes: tuple[str, ...], val: Tree) -> None:
    strangers = sorted({parts[0] for parts in val if len(parts) > 1} - set(classes))
    if strangers:
        raise DataError(
            f"{name}: {len(strangers)} classes have validation but no training images:\n{list_first(strangers)}\n"
            f"Way out: the same class folders in both"
        )


def _items(tree: Tree, classes: tuple[str, ...]) -> list[Item]:
    label = {name: i for i, name in enumerate(classes)}
    return [
        Item("/".join(parts), label[parts[0]], entry.ref, entry.size, entry.stamp)
        for parts, entry in sorted(tree.items())
        if len(parts) > 1
    ]


def open_manifest(path: Path, options: SourceOptions) -> Source:
    """A CSV with the header `path,label[,split]`; paths are relative to it, labels are names or integers."""
    rows = _read_rows(path)
    classes, labels = number_labels(path, [row["label"].strip() for row in rows])
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    missing = []
    for row, label in zip(rows, labels, strict=True):
        file = path.parent / row["path"]
        if not file.is_file():
            missing.append(row["path"])
            continue
        stat = file.stat()
        item = Item(row["path"], label, row["path"], stat.st_size, f"{stat.st_size}:{stat.st_mtime_ns}")
        splits[row["split"]].append(item)
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(rows)} files do not exist:\n{list_first(missing)}\n"
            "Way out: paths are relative to the manifest's folder"
        )
    if not splits["val"]:
        splits = split_by_hash(splits["train"], _fraction(options), options.seed)
    return Source(path.stem, classes, splits, FileReader(str(path.parent.resolve())))


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        if not {"path", "label"} <= set(header):
            raise DataError(
                f"{path}: header is {','.join(header)!r}. Way out: first line `path,label` or `path,label,split`"
            )
        rows = [{key: value or "" for key, value in row.items() if key in header} for row in reader]
    faults = [f"line {i}: {fault}" for i, row in enumerate(rows, 2) if (fault := _normalise(row))]
    seen: set[str] = set()
    faults += [f"{row['path']} stands there twice" for row in rows if row["path"] in seen or seen.add(row["path"])]
    if faults:
        raise DataError(f"{path}: {len(faults)} faults:\n{list_first(faults)}\nWay out: mend these lines")
    return rows


def _normalise(row: dict[str, str]) -> str | None:
    split = row.get("split", "").strip() or "train"
    row["split"] = "val" if split in VAL_NAMES else split
    if not row["path"] or not row["label"].strip():
        return "path and label must not be empty"
    return None if row["split"] in ("train", "val") else f"split {split!r} is neither train nor val"


def number_labels(path: Path, labels: list[str]) -> tuple[tuple[str, ...], list[int]]:
    """Integers stand for themselves; otherwise classes are numbered in the order of their names."""
    if labels and all(label.isdecimal() for label in labels):
        numbers = [int(label) for label in labels]
        if max(numbers) >= MOST_CLASSES:
            raise DataError(f"{path}: label {max(numbers)} is too large. Way out: number classes from 0")
        return tuple(str(i) for i in range(max(numbers) + 1)), numbers
    names = tuple(sorted(set(labels)))
    number = {name: i for i, name in enumerate(names)}
    return names, [number[label] for label in labels]
