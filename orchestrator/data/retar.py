"""A tar written again with other bytes in some members: every header, name and byte else stays as it lies."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from orchestrator.data.members import BLOCK, Member, read_entries, split_name

CHUNK = 1 << 20

Change = Callable[[Member, bytes], bytes]
"""(member, its bytes) -> the bytes that take their place, or the same object"""


def rewrite_tar(source: Path, target: IO[bytes], wanted: frozenset[str], change: Change) -> None:
    """Copy a tar, passing members with a wanted extension through `change`. Raises DataError for a damaged tar."""
    entries, end = read_entries(source)
    ends = [*(entry.offset for entry in entries[1:]), end]
    with source.open("rb") as file:
        for entry, after in zip(entries, ends, strict=True):
            member = _member(entry)
            if member is None or member.extension not in wanted:
                _copy(file.fileno(), entry.offset, after, target)
                continue
            data = os.pread(file.fileno(), entry.size, entry.offset_data)
            changed = change(member, data)
            head = os.pread(file.fileno(), entry.offset_data - entry.offset, entry.offset)
            target.write(head if changed is data else _with_size(head, len(changed)))
            target.write(changed)
            target.write(bytes(-len(changed) % BLOCK))
    target.write(bytes(2 * BLOCK))
    target.write(bytes(-target.tell() % tarfile.RECORDSIZE))


def _member(entry: tarfile.TarInfo) -> Member | None:
    """None for what has no bytes of its own to change."""
    named = split_name(entry.name) if entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else None
    if named is None or "size" in entry.pax_headers or entry.sparse is not None:
        return None
    return Member(*named, entry.offset_data, entry.size, entry.name)


def _copy(fd: int, at: int, end: int, target: IO[bytes]) -> None:
    while at < end:
        chunk = os.pread(fd, min(CHUNK, end - at), at)
        if not chunk:  # padding that the last member of a tar lacks
            chunk = bytes(min(CHUNK, end - at))
        target.write(chunk)
        at += len(chunk)


def _with_size(head: bytes, size: int) -> bytes:
    """The headers of one member with another size: at byte 124 of the last block, checksum at 148 (POSIX ustar)."""
    block = bytearray(head[-BLOCK:])
    block[124:136] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return head[:-BLOCK] + bytes(block)
