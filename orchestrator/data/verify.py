"""Every byte of a shard set read again, every image decoded: what is wrong, and where exactly."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.data.fetch import local_path
from orchestrator.data.images import ImageError, decode_image
from orchestrator.data.index import Members, Shard, ShardIndex, read_members
from orchestrator.data.members import group_samples, read_idx, scan_members
from orchestrator.errors import DataError
from orchestrator.files import hash_file


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is not as it should be; `member` and `offset` (bytes) where it is about one member."""

    shard: str
    fault: str
    member: str | None = None
    offset: int | None = None

    def __str__(self) -> str:
        place = f" {self.member} at byte {self.offset:,}" if self.member and self.offset is not None else ""
        return f"{self.shard}{place}: {self.fault}"


def verify_set(index: ShardIndex, max_pixels: int, advance: Callable[[int], None]) -> list[Fault]:
    """All faults of a set: length, sha256, tar, `.idx`, samples, labels, images, class counts."""
    faults: list[Fault] = []
    counts = [0] * index.num_classes
    for shard in index.shards:
        found, labels = _verify_shard(shard, index.num_classes, max_pixels, advance)
        faults += found
        for label in labels:
            counts[label] += 1
    if not faults and sum(counts) == sum(index.class_counts) and tuple(counts) != index.class_counts:
        wrong = [i for i, count in enumerate(counts) if count != index.class_counts[i]]
        names = ", ".join(f"{index.classes[i]} {counts[i]} (index: {index.class_counts[i]})" for i in wrong[:5])
        faults.append(Fault(index.location, f"class counts differ: {names}"))
    return faults


def require_readable(shard: Shard, max_pixels: int, images: int) -> None:
    """Raise DataError where a shard has not the bytes of the index, or one of its first `images` cannot be decoded."""
    path = local_path(shard)
    members = read_members(path, shard.label, shard.classes)
    limits = (1 + int(members.label.max(initial=0)), max_pixels)
    first = replace(members, keys=members.keys[:images])
    faults = _check_file(path, shard) + _check_samples(path, shard, first, limits, lambda n: None)
    if faults:
        raise DataError(f"{faults[0]}. Way out: `orchestrator shards verify` names all faults; copy or pack it again")


def _verify_shard(
    shard: Shard, num_classes: int, max_pixels: int, advance: Callable[[int], None]
) -> tuple[list[Fault], list[int]]:
    try:
        path = local_path(shard)
        faults = _check_file(path, shard)
        members = read_members(path, shard.label, shard.classes)
    except DataError as error:
        advance(shard.nsamples)
        return [Fault(shard.location, str(error))], []
    if len(members.keys) != shard.nsamples:
        faults.append(Fault(shard.location, f"{len(members.keys)} samples, the index says {shard.nsamples}"))
    faults += _check_samples(path, shard, members, (num_classes, max_pixels), advance)
    return faults, [label for label in members.label.tolist() if label < num_classes]


def _check_file(path: Path, shard: Shard) -> list[Fault]:
    faults = []
    digest = hash_file(path)
    if digest != shard.sha256:
        faults.append(Fault(shard.location, f"sha256 is {digest}, the index says {shard.sha256}"))
    scanned = list(group_samples(scan_members(path)))
    idx = path.with_suffix(".idx")
    if idx.is_file() and read_idx(idx, path.stat().st_size) != scanned:
        faults.append(
            Fault(shard.location, f"{idx.name} disagrees with the tar (`orchestrator shards index` renews it)")
        )
    return faults


def _check_samples(
    path: Path, shard: Shard, members: Members, limits: tuple[int, int], advance: Callable[[int], None]
) -> list[Fault]:
    num_classes, max_pixels = limits
    faults = []
    with path.open("rb") as file:
        for i, key in enumerate(members.keys):
            name, offset = f"{key}.{members.extension[i]}", int(members.image_offset[i])
            if members.label[i] >= num_classes:
                fault = f"label {members.label[i]}, but there are {num_classes} classes"
                faults.append(Fault(shard.location, fault, f"{key}.{shard.label}", offset))
            try:
                decode_image(os.pread(file.fileno(), int(members.image_size[i]), offset), max_pixels)
            except ImageError as error:
                faults.append(Fault(shard.location, str(error), name, offset))
            advance(1)
    return faults
