"""What shards hold: the index of a set (`shards.json`), and keys, labels and byte ranges of one shard's samples."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.labels import number_of, read_label, split_label
from orchestrator.data.members import (
    BLOCK,
    IMAGE_EXTENSIONS,
    Member,
    group_samples,
    list_first,
    read_idx,
    scan_members,
)
from orchestrator.data.remote import beside, is_url
from orchestrator.data.transfer import read_all
from orchestrator.errors import DataError

INDEX_NAME = "shards.json"
SCHEMA = 1
MOST_NAMES = 1000
"""That are looked at for the one that was meant."""
KIND = "wids-shard-index-v1"

_KINDS = "jpg, jpeg, png or webp"
_MAKE = (
    "Way out: `orchestrator shards make SOURCE OUT` packs images, `orchestrator shards index` indexes tars that exist"
)

_REINDEX = "Way out: `orchestrator shards index` writes it again"


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a set; `location` is an absolute path or a URL.

    `label` is the extension of the members with labels, or json:FIELD, a field of the samples' JSON members; labels are
    class numbers, or names among `classes`.
    """

    location: str
    nsamples: int
    filesize: int
    sha256: str
    label: str = "cls"
    classes: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class ShardIndex:
    """A set of shards. `class_counts` are those of the whole set, also where a pattern selects some of its shards."""

    location: str
    name: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.nsamples for shard in self.shards)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def digest(self) -> str:
        """Identity of the data wherever it lies: sha256 over hash and sample count of the shards in their order."""
        lines = (f"{shard.sha256} {shard.nsamples}\n" for shard in self.shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Members:
    """The samples of one shard in the order of the tar; `extension` is that of the image, in lower case."""

    keys: list[str]
    image_offset: np.ndarray  # (N,) int64, bytes from the start of the tar
    image_size: np.ndarray  # (N,) int64, bytes
    label: np.ndarray  # (N,) int64
    extension: list[str]


def load_index(location: str) -> ShardIndex:
    """Read the index of a folder, of a `shards.json`, or of a brace pattern of tars (then only those shards).

    Raises DataError for what is missing, empty or malformed.
    """
    pattern, index_at = _locate(location)
    body = _parse(index_at)
    try:
        index = _build(index_at, body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{index_at}: not a complete shard index ({type(error).__name__}: {error}). {_REINDEX}"
        ) from error
    if not index.num_samples:
        raise DataError(f"{index_at}: the index holds no sample. {_MAKE}")
    return _select(index, pattern) if pattern else index


def read_body(location: str) -> dict[str, Any]:
    """The whole content of an index file, for what `ShardIndex` leaves out: histogram, conversions, skipped."""
    return _parse(_locate(location)[1])


def _locate(location: str) -> tuple[list[str] | None, str]:
    pattern = _expand(location) if location.endswith(".tar") else None
    return pattern, _index_location(location, pattern)


def _expand(location: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        places = list(braceexpand(location))
    except ValueError as error:
        raise DataError(f"{location}: {error}. Way out: e.g. train-{{000000..000009}}.tar") from error
    return [place if is_url(place) else os.path.abspath(place) for place in places]


def _index_location(location: str, pattern: list[str] | None) -> str:
    if pattern:
        return pattern[0].rsplit("/", 1)[0] + "/" + INDEX_NAME
    if not is_url(location):
        location = os.path.abspath(os.path.expanduser(location))
    return location if location.endswith(".json") else location.rstrip("/") + "/" + INDEX_NAME


def _parse(index_at: str) -> dict[str, Any]:
    text = read_all(index_at) if is_url(index_at) else _read_file(Path(index_at))
    try:
        body = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{index_at}: not JSON ({error}). Way out: `orchestrator shards index` writes it again"
        ) from error
    kind = body.get("__kind__") if isinstance(body, dict) else type(body).__name__
    if kind != KIND:
        raise DataError(f"{index_at}: kind {kind!r} is not {KIND!r}. Way out: name the {INDEX_NAME} of a shard set")
    if body.get("schema", SCHEMA) != SCHEMA:
        raise DataError(
            f"{index_at}: schema {body['schema']}, this version reads {SCHEMA}. Way out: `orchestrator shards index`"
        )
    return body


def _meant(folder: Path) -> str:
    """The folder beside it that has nearly its name, as a question."""
    there = next(parent for parent in folder.parents if parent.is_dir())
    first, *rest = folder.relative_to(there).parts
    with suppress(OSError):
        names = [entry.name for entry in islice(there.iterdir(), MOST_NAMES)]
        for close in get_close_matches(first, names, cutoff=0.6):
            if there.joinpath(close, *rest).is_dir():
                return f" (did you mean {there.joinpath(close, *rest)}?)"
    return ""


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        what = f"has no {INDEX_NAME}" if path.parent.is_dir() else f"does not exist{_meant(path.parent.absolute())}"
        raise DataError(f"{path.parent}: the shard folder {what}. {_MAKE}") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Way out: name a shard folder you may read"
        ) from error


def _build(index_at: str, body: dict[str, Any]) -> ShardIndex:
    classes = tuple(str(name) for name in body["classes"])
    shards = tuple(_shard(index_at, entry, classes) for entry in body["shardlist"])
    counts = tuple(int(count) for count in body["class_counts"])
    if len(classes) != len(counts):
        raise ValueError(f"{len(classes)} classes but {len(counts)} class_counts")
    return ShardIndex(index_at, str(body.get("name", "")), shards, classes, counts)


def _shard(index_at: str, entry: dict[str, Any], classes: tuple[str, ...]) -> Shard:
    url = str(entry["url"])
    if not is_url(url):
        folder = os.path.dirname(index_at)
        url = beside(index_at, url) if is_url(index_at) else os.path.normpath(os.path.join(folder, url))
    label = str(entry.get("label", "cls"))
    return Shard(url, int(entry["nsamples"]), int(entry["filesize"]), str(entry["sha256"]), label, classes)


def _select(index: ShardIndex, pattern: list[str]) -> ShardIndex:
    known = {shard.location: shard for shard in index.shards}
    unknown = [place for place in pattern if place not in known]
    if unknown:
        raise DataError(
            f"{index.location}: {len(unknown)} of {len(pattern)} shards of the pattern are not in the index:\n"
            f"{list_first(unknown)}\nWay out: narrow the pattern, or `orchestrator shards index` after adding tars"
        )
    return ShardIndex(index.location, index.name, tuple(known[p] for p in pattern), index.classes, index.class_counts)


def load_members(path: Path, shard: Shard) -> Members:
    """Find every sample of the shard that lies at `path`; labels are read, images are not.

    Raises DataError where the index is stale or samples are not one image and one `cls` label each.
    """
    require_size(path, shard)
    members = read_members(path, shard.label, shard.classes)
    if len(members.keys) != shard.nsamples:
        raise _stale(path, f"{len(members.keys):,} samples, the index says {shard.nsamples:,}")
    return members


def require_size(path: Path, shard: Shard) -> None:
    """Raise DataError where the file at `path` is not as long as the index says."""
    size = path.stat().st_size
    if size != shard.filesize:
        raise _stale(path, f"{size:,} bytes, the index says {shard.filesize:,}")


def _stale(path: Path, what: str) -> DataError:
    return DataError(f"index stale: {path} has {what}. Way out: `orchestrator shards index {path.parent}`")


def read_members(path: Path, label: str, classes: Sequence[str] = ()) -> Members:
    """Like `load_members` for a tar that no index describes yet."""
    numbers = {name: i for i, name in enumerate(classes)}
    with path.open("rb") as file:
        samples = read_idx(path.with_suffix(".idx"), os.fstat(file.fileno()).st_size)
        if samples is not None and all(_header_agrees(file.fileno(), sample, label) for sample in samples):
            return _collect(path, file.fileno(), samples, (label, numbers))
        return _collect(path, file.fileno(), group_samples(scan_members(path)), (label, numbers))


def _header_agrees(fd: int, sample: list[Member], label: str) -> bool:
    """An `.idx` of an older tar of the same size points at bytes whose header has another name or size."""
    extension, _ = split_label(label)
    for member in sample:
        if member.extension == extension:
            header = os.pread(fd, BLOCK, member.offset - BLOCK)
            base = member.name.rsplit("/", 1)[-1].encode()[-90:]
            return header[257:262] == b"ustar" and header[124:135] == b"%011o" % member.size and base in header
    return True


def _collect(path: Path, fd: int, samples: Iterable[list[Member]], label: tuple[str, Mapping[str, int]]) -> Members:
    keys, extensions, rows, faults = [], [], [], []
    for sample in samples:
        try:
            image, text = read_sample(fd, sample, label[0])
            number = number_of(text, label[1])
        except ValueError as error:
            faults.append(f"sample {sample[0].key} at byte {sample[0].offset:,}: {error}")
            continue
        keys.append(image.key)
        extensions.append(image.extension)
        rows.append((image.offset, image.size, number))
    if faults:
        raise DataError(
            f"{path}: {len(faults)} samples are not one image and one label:\n{list_first(faults)}\n"
            "Way out: `orchestrator shards index` with --label EXT or --label json:FIELD where labels lie elsewhere; "
            "a sample's members lie side by side (`tar --sort=name`), its key ends at the first dot"
        )
    columns = np.asarray(rows, np.int64).reshape(-1, 3).T
    return Members(keys, columns[0], columns[1], columns[2], extensions)


def read_sample(fd: int, sample: list[Member], label: str) -> tuple[Member, str]:
    """The member that is the image, and the label as it stands there; raises ValueError without one of each."""
    images = [member for member in sample if member.extension in IMAGE_EXTENSIONS]
    extension, inside = split_label(label)
    labels = [member for member in sample if member.extension == extension]
    if len(images) != 1 or len(labels) != 1:
        found = ", ".join(member.extension for member in sample)
        what = f"{len(labels)} {extension} labels" if len(images) == 1 else f"{len(images)} images of {_KINDS}"
        raise ValueError(f"{what}, must be 1; it has {found}")
    return images[0], read_label(fd, labels[0], inside)
