"""Which image goes into which shard under which key: pure, and the same for any number of packing processes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.data.crop_ready import is_available
from orchestrator.data.images import MAX_PIXELS
from orchestrator.data.pack import ImageRules
from orchestrator.data.sources import Item, Source, name_hash, require_flags

FORMATS = ("keep", "jpeg", "png")
HEADERS_PER_SAMPLE = 4 * 512  # two headers, the label, and on average two half blocks of padding
MIB = 1 << 20
LONGEST_KEY = 75  # with a hash and an extension it still fits the 100 bytes of a tar header

_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9/_-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class MakeOptions:
    """How a source becomes shards."""

    shard_size_mib: int = 256
    samples_per_shard: int | None = None
    workers: int | None = None
    """Packing processes; None: one per core where there is work for them."""
    max_side: int | None = None
    short_side: int | None = None
    crop_ready: bool = True
    """Rewrite JPEGs without loss so that a crop decodes only its part, where this machine can."""
    quality: int | None = None
    format: str = "keep"
    on_bad: str = "fail"
    seed: int = 0
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        require_flags(
            ("--shard-size-mib", self.shard_size_mib, 1, 1 << 20),
            ("--samples-per-shard", self.samples_per_shard, 1, 1 << 40),
            ("--workers", self.workers, 1, 1024),
            ("--max-side", self.max_side, 1, 65535),
            ("--short-side", self.short_side, 1, 65535),
            ("--quality", self.quality, 1, 100),
            ("--max-pixels", self.max_pixels, 1, 1 << 40),
        )

    @property
    def rules(self) -> ImageRules:
        return ImageRules(
            format=self.format,
            quality=self.quality,
            max_side=self.max_side,
            short_side=self.short_side,
            crop_ready=self.crop_ready and is_available(),
            max_pixels=self.max_pixels,
        )


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Shards of one split, each a list of (key, item) in the order of the tar."""

    split: str
    shards: list[list[tuple[str, Item]]]
    digest: str

    @property
    def num_samples(self) -> int:
        return sum(map(len, self.shards))

    def shard_name(self, number: int) -> str:
        return f"{self.split}-{number:06d}.tar"

    def shard_digest(self, number: int) -> str:
        return hashlib.sha256(f"{self.digest} {number}".encode()).hexdigest()


def plan_split(source: Source, split: str, options: MakeOptions) -> SplitPlan:
    """Shuffle once by seed across all shards, then cut where a shard is full."""
    items = sorted(source.splits[split], key=lambda item: name_hash(options.seed, "shuffle", item.name))
    shards = list(_cut(list(zip(make_keys(items), items, strict=True)), options))
    return SplitPlan(split, shards, _digest(source, split, shards, options))


def _cut(samples: list[tuple[str, Item]], options: MakeOptions) -> Iterator[list[tuple[str, Item]]]:
    shard, size = [], 0
    most_bytes = options.shard_size_mib * MIB
    for key, item in samples:
        cost = item.size + HEADERS_PER_SAMPLE
        full = len(shard) == options.samples_per_shard if options.samples_per_shard else size + cost > most_bytes
        if shard and full:
            yield shard
            shard, size = [], 0
        shard.append((key, item))
        size += cost
    if shard:
        yield shard


def make_keys(items: list[Item]) -> list[str]:
    """A key per item that tar readers of every kind split as meant: no dots, no blanks, ASCII, short, each once.

    Names that would collide or are too long get a part of their hash; which ones depends only on the set of names.
    """
    stems = [_stem(item.name) for item in items]
    seen: dict[str, int] = {}
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
    return [
        stem if seen[stem] == 1 and len(stem) <= LONGEST_KEY else f"{stem[:LONGEST_KEY]}-{_short_hash(item.name)}"
        for stem, item in zip(stems, items, strict=True)
    ]


def _stem(name: str) -> str:
    head, _, tail = name.rpartition("/")
    stem = tail.rsplit(".", 1)[0] if "." in tail[1:] else tail
    clean = _NOT_IN_KEYS.sub("_", f"{head}/{stem}" if head else stem).strip("/")
    return f"x{clean}" if not clean or clean.startswith("_") else clean


def _short_hash(name: str) -> str:
    return name_hash(0, "key", name).hex()[:16]


def _digest(source: Source, split: str, shards: list[list[tuple[str, Item]]], options: MakeOptions) -> str:
    """Everything that decides the bytes of the shards, so that a half-made set is only continued as the same set."""
    from PIL import __version__ as pillow

    head: dict[str, Any] = {
        "split": split, "classes": source.classes, "rules": asdict(options.rules), "on_bad": options.on_bad,
        "pillow": pillow,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for shard in shards:
        digest.update(b"shard\n")
        for key, item in shard:
            digest.update(f"{key}\t{item.label}\t{item.size}\t{item.stamp}\t{item.name}\n".encode("utf-8", "replace"))
    return digest.hexdigest()
