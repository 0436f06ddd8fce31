"""What lies where inside a tar: one scan of its headers, and the same facts in the `.idx` form of NVIDIA DALI."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from orchestrator.errors import DataError

BLOCK = 512
IDX_VERSION = "v1.2"
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
SHOWN = 20

_META = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """One file of a tar: where its bytes start and how many they are."""

    key: str
    extension: str
    offset: int
    size: int
    name: str


def list_first(lines: Iterable[str]) -> str:
    """The offenders of a message, one to a line: the first 20, then how many more there are."""
    lines = list(lines)
    more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([*(f"  {line}" for line in lines[:SHOWN]), *more])


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member by WebDataset's rule: the extension starts at the first dot of the base name.

    None for what WebDataset leaves out: no extension, a hidden file, `__meta__` entries.
    """
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    if dot <= slash or _META.match(name):
        return None
    return name[:dot], name[dot + 1 :].lower()


def scan_members(path: Path) -> Iterator[Member]:
    """All regular files of a tar in their order; raises what `read_entries` raises."""
    for info in read_entries(path)[0]:
        named = split_name(info.name) if info.isreg() else None
        if named:
            yield Member(*named, info.offset_data, info.size, info.name)


def read_entries(path: Path) -> tuple[list[tarfile.TarInfo], int]:
    """Everything that a tar lists, and the byte where it ends; headers are read, contents are not.

    Raises DataError where the tar is not one, is cut short or is damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            entries, end = tar.getmembers(), tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a readable tar ({error}). Way out: copy or make this shard again") from error
    _require_end(path, end)
    return entries, end


def _require_end(path: Path, offset: int) -> None:
    """TarFile takes a damaged header in the middle for the end of the archive: a real end is a block of zeros."""
    with path.open("rb") as file:
        file.seek(offset)
        end = file.read(BLOCK)
    if len(end) < BLOCK or any(end):
        raise DataError(
            f"{path}: damaged or cut short at byte {offset:,}: no end of archive there. "
            "Way out: copy or make this shard again"
        )


def group_samples(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Neighbours with the same key form a sample, as in WebDataset."""
    for _, group in groupby(members, key=lambda member: member.key):
        yield list(group)


def write_idx(path: Path, samples: list[list[Member]]) -> None:
    """Write what DALI's wds2idx does: `v1.2 N`, then `extension offset size name` of each member, a line per sample."""
    lines = [f"{IDX_VERSION} {len(samples)}"]
    lines += [
        " ".join(f"{m.name[len(m.key) + 1 :]} {m.offset} {m.size} {m.name}" for m in sample) for sample in samples
    ]  # the extension as it is written: DALI tells JPEG from jpeg
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_idx(path: Path, tar_size: int) -> list[list[Member]] | None:
    """The samples of an `.idx`, or None where it is absent, of another form or points outside the tar."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        version, count = lines[0].split()
        samples = [_parse_sample(line) for line in lines[1:]]
        complete = version == IDX_VERSION and int(count) == len(samples)
    except (OSError, ValueError, IndexError, TypeError):
        return None
    inside = all(m.offset >= BLOCK and m.size >= 0 and m.offset + m.size <= tar_size for s in samples for m in s)
    return samples if complete and inside else None


def _parse_sample(line: str) -> list[Member]:
    words = line.split(" ")
    if len(words) % 4:
        raise ValueError("each member has four words")
    groups = zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True)
    return [_member(name, int(offset), int(size)) for _, offset, size, name in groups]


def _member(name: str, offset: int, size: int) -> Member:
    named = split_name(name)
    if named is None:
        raise ValueError(f"{name} has no extension")
    return Member(*named, offset, size, name)
