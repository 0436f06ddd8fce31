"""A checksum per member beside a shard (`x-000.crc`), so that a flipped bit has a name.

Text: `crc32 v1 N`, then N lines `CRC OFFSET SIZE NAME` in the order of the tar: the crc32 of the member's bytes as 8
hex digits, where these bytes start, how many they are, and the member's name to the end of the line.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import NamedTuple

from orchestrator.data.members import read_entries
from orchestrator.files import replacing

SUFFIX = ".crc"
HEAD = "crc32 v1"
_CHUNK = 1 << 20


class Sum(NamedTuple):
    """What one member should be; `crc` is None where only an `.idx` told of it."""

    crc: int | None
    offset: int
    size: int
    name: str


def write_sums(tar: Path) -> None:
    """Write the sums beside a tar that is whole. Raises DataError for one that is not, OSError."""
    entries = [entry for entry in read_entries(tar)[0] if entry.isreg()]
    with tar.open("rb") as file:
        rows = [(crc_at(file.fileno(), e.offset_data, e.size), e.offset_data, e.size, e.name) for e in entries]
    lines = [f"{HEAD} {len(rows)}", *(f"{crc:08x} {offset} {size} {name}" for crc, offset, size, name in rows)]
    with replacing(tar.with_suffix(SUFFIX)) as out:
        out.write(("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))


def crc_at(fd: int, offset: int, size: int) -> int:
    """crc32 of a stretch of a file; of what there is of it, where the file ends early."""
    crc, end = 0, offset + size
    while offset < end and (chunk := os.pread(fd, min(_CHUNK, end - offset), offset)):
        crc = zlib.crc32(chunk, crc)
        offset += len(chunk)
    return crc


def parse_sums(content: bytes) -> list[Sum] | None:
    """The sums in a file's content, None where it is not one of this form."""
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    try:
        sums = [_parse(line) for line in lines[1:-1]]
    except ValueError:
        return None
    return sums if lines[0] == f"{HEAD} {len(sums)}" else None


def _parse(line: str) -> Sum:
    crc, offset, size, name = line.split(" ", 3)
    return Sum(int(crc, 16), int(offset), int(size), name)
