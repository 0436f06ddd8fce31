"""One shard from items: read, check, convert where needed, write, and state what was written."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from orchestrator.data.claim import facts_path
from orchestrator.data.crop_ready import make_crop_ready
from orchestrator.data.images import (
    EXTENSIONS,
    PLAIN,
    SOURCE_FORMATS,
    Decoded,
    ImageError,
    decode,
    encode_image,
    shrink,
)
from orchestrator.data.members import group_samples, scan_members, write_idx
from orchestrator.data.sources import Item, Read
from orchestrator.data.sums import write_sums
from orchestrator.files import replacing, write_json

QUALITY = 95
OTHER_FORMAT = "other_format"
RESIZED = "resized"
REENCODED = "reencoded"
CROP_READY = "crop_ready"


class Stopped(Exception):
    """Packing was asked to end; nothing of the shard stays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRules:
    """What decides the bytes of a stored image."""

    format: str  # keep, jpeg or png
    quality: int | None  # given: JPEGs are encoded anew; None: 95 where one must be
    max_side: int | None
    short_side: int | None = None
    crop_ready: bool = False
    """Write JPEGs with restart markers, the same coefficients otherwise."""
    max_pixels: int


class Stored(NamedTuple):
    """An image as it goes into the tar."""

    data: bytes
    extension: str
    size: str  # WIDTHxHEIGHT
    conversions: frozenset[str]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """All that a packing process needs for one shard."""

    path: str
    digest: str
    samples: list[tuple[str, Item]]  # key, item
    read: Read
    rules: ImageRules


@dataclass(kw_only=True, slots=True)
class ShardFacts:
    """What a shard holds; stored beside unfinished sets so that a killed packing goes on."""

    file: str
    digest: str
    nsamples: int = 0
    filesize: int = 0
    sha256: str = ""
    class_counts: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    converted: dict[str, int] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    """Members by extension that are neither images nor labels."""


def store_image(picture: bytes | np.ndarray, rules: ImageRules) -> Stored:
    """An image as the rules want it, a JPEG crop-ready where they ask for it. Raises ImageError."""
    stored = _store_checked(picture, rules)
    ready = make_crop_ready(stored.data) if rules.crop_ready and stored.extension == "jpg" else None
    return stored._replace(data=ready, conversions=stored.conversions | {CROP_READY}) if ready else stored


def _store_checked(picture: bytes | np.ndarray, rules: ImageRules) -> Stored:
    """Check an image; keep its bytes if they are a plain JPEG, PNG or WebP within the rules."""
    if isinstance(picture, np.ndarray):
        decoded = Decoded(picture, frozenset(), "pixels")
    else:
        decoded = decode(picture, rules.max_pixels, SOURCE_FORMATS)
    pixels, notes, kind = decoded.pixels, decoded.notes, decoded.format
    target = _target_kind(kind, rules.format)
    small = shrink(pixels, rules.max_side, rules.short_side)
    size = f"{small.shape[1]}x{small.shape[0]}"
    plain = notes <= PLAIN and kind == target and small is pixels
    if isinstance(picture, bytes) and plain and not (kind == "JPEG" and rules.quality):
        return Stored(picture, EXTENSIONS[kind], size, frozenset())
    if "gray" in notes and "alpha" not in notes:
        small = small[..., 0]
    data = encode_image(small, target, rules.quality or QUALITY, decoded.subsampling)
    changes = _conversions(kind, notes, small.shape[:2] != pixels.shape[:2])
    return Stored(data, EXTENSIONS[target], size, changes)


def _target_kind(kind: str, wanted: str) -> str:
    if wanted != "keep":
        return wanted.upper()
    return kind if kind in EXTENSIONS else "PNG"


def _conversions(kind: str, notes: frozenset[str], resized: bool) -> frozenset[str]:
    if kind == "pixels":
        return frozenset({RESIZED} if resized else ())
    more = {REENCODED, *([RESIZED] if resized else []), *([] if kind in EXTENSIONS else [OTHER_FORMAT])}
    return (notes - PLAIN) | more


def pack_shard(task: ShardTask, tick: Callable[[], None], stopped: Callable[[], bool]) -> ShardFacts:
    """Write tar, `.idx`, sums and facts of one shard; bad images are left out and named.

    Raises Stopped, OSError of the disk.
    """
    path = Path(task.path)
    facts = ShardFacts(file=path.name, digest=task.digest)
    with replacing(path) as file:
        hashing = _Hashing(file)
        with tarfile.TarFile(fileobj=cast("IO[bytes]", hashing), mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, label, stored in _stored(task, facts, tick, stopped):
                _add(tar, f"{key}.cls", str(label).encode())
                _add(tar, f"{key}.{stored.extension}", stored.data)
                _count(facts, label, stored)
        facts.filesize, facts.sha256 = hashing.size, hashing.digest.hexdigest()
    write_idx(path.with_suffix(".idx"), list(group_samples(scan_members(path))))
    write_sums(path)
    write_json(facts_path(path), asdict(facts))
    return facts


def _stored(
    task: ShardTask, facts: ShardFacts, tick: Callable[[], None], stopped: Callable[[], bool]
) -> Iterator[tuple[str, int, Stored]]:
    for key, item in task.samples:
        if stopped():
            raise Stopped
        try:
            yield key, item.label, store_image(task.read(item.ref), task.rules)
        except (ImageError, OSError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            facts.bad.append(f"{item.name}: {reason}")
        tick()


def _count(facts: ShardFacts, label: int, stored: Stored) -> None:
    facts.nsamples += 1
    for counts, names in (
        (facts.class_counts, [str(label)]),
        (facts.sizes, [stored.size]),
        (facts.converted, sorted(stored.conversions)),
    ):
        for name in names:
            counts[name] = counts.get(name, 0) + 1


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """The header that webdataset.TarWriter writes, with the time fixed; importing webdataset would import torch."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o444, 0
    info.uname = info.gname = "bigdata"
    tar.addfile(info, io.BytesIO(data))


class _Hashing:
    """A file that knows length and sha256 of what was written."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


def add_counts(parts: list[dict[Any, int]]) -> dict[Any, int]:
    total: Counter[Any] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items()))
