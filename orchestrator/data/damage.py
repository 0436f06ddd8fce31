"""What is wrong with a shard whose bytes are not those of the index: where it is cut, or which member changed."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from orchestrator.data.index import Shard
from orchestrator.data.members import BLOCK, read_idx
from orchestrator.data.sums import SUFFIX, Sum, crc_at, parse_sums
from orchestrator.errors import DataError
from orchestrator.redact import redact

_CHUNK = 1 << 20
_ANY_LENGTH = 1 << 62


class Damage(NamedTuple):
    """One fault: what, in or before which member, at which byte of the shard."""

    what: str
    member: str | None = None
    offset: int | None = None

    def __str__(self) -> str:
        member = f", member {self.member}" if self.member else ""
        return f"{self.what}{member}" + (f", offset {self.offset:,}" if self.offset is not None else "")


class DamagedShard(DataError):
    """A shard whose bytes are not those of the index; `shard` is its entry there."""

    def __init__(self, shard: Shard, damage: Damage):
        self.shard, self.damage = shard, damage
        super().__init__(
            f"{redact(shard.location)}: damaged: {damage}. Way out: put this shard there again, or "
            "`orchestrator shards index` if what lies there is right; data.on_damage=quarantine leaves its samples out "
            "and counts them"
        )

    def __reduce__(self):
        return type(self), (self.shard, self.damage)


def known_members(path: Path) -> list[Sum]:
    """What the files beside a shard say about its members: the sums, else the `.idx`, else nothing."""
    try:
        sums = parse_sums(path.with_suffix(SUFFIX).read_bytes())
    except OSError:
        sums = None
    if sums is not None:
        return sums
    samples = read_idx(path.with_suffix(".idx"), _ANY_LENGTH) or []
    return [Sum(None, member.offset, member.size, member.name) for sample in samples for member in sample]


def find_damage(path: Path, shard: Shard, known: Sequence[Sum]) -> Damage:
    """The first fault of a file that should be this shard; `known` is what was noted about its members."""
    with path.open("rb") as file:
        fd, size = file.fileno(), os.fstat(file.fileno()).st_size
        if size == 0:
            return Damage(f"empty (0 bytes, the index says {shard.filesize:,})", _expected(known, 0), 0)
        entries, end = _walk(path)
        fault = _cut(entries, end, size, known) or _broken(fd, end, size, known)
        if size != shard.filesize:
            numbers = f"{size:,} bytes, the index says {shard.filesize:,}"
            fault = fault or Damage("cut short after the last member", None, size)
            return fault._replace(what=f"{fault.what} ({numbers})")
        return fault or _changed(fd, known) or _elsewhere(path, known)


def _walk(path: Path) -> tuple[list[tarfile.TarInfo], int]:
    """The entries up to the first fault, and the byte where the next header should be."""
    entries: list[tarfile.TarInfo] = []
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            while entry := tar.next():
                entries.append(entry)
                end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError):
        pass  # what stopped the walk is what the caller looks for
    return entries, end


def _expected(known: Sequence[Sum], at: int) -> str | None:
    """The member that should lie at or after a byte, with its header before its data."""
    return next((member.name for member in known if member.offset + max(member.size, 1) > at), None)


def _cut(entries: list[tarfile.TarInfo], end: int, size: int, known: Sequence[Sum]) -> Damage | None:
    if end + BLOCK <= size:
        return None
    last = entries[-1] if entries else None
    if last and last.offset_data + last.size > size:
        return Damage("cut short in the data", last.name, size)
    if last and end > size:
        return Damage("cut short in the padding", last.name, size)
    name = _expected(known, end) or (f"after {last.name}" if last else None)
    where = "at the border of two members" if end == size else "in a header"
    return Damage(f"cut short {where}", name, size)


def _broken(fd: int, end: int, size: int, known: Sequence[Sum]) -> Damage | None:
    """A header is broken unless it is the end of the archive, after which all is zero."""
    block = os.pread(fd, BLOCK, end)
    if any(block):
        what = "broken header"
    elif _any_after(fd, end + BLOCK, size):
        what = "header of zeros"
    else:
        return None
    return Damage(what, _expected(known, end), end)


def _any_after(fd: int, at: int, size: int) -> bool:
    while at < size:
        chunk = os.pread(fd, min(_CHUNK, size - at), at)
        if any(chunk):
            return True
        at += len(chunk) or size
    return False


def _changed(fd: int, known: Sequence[Sum]) -> Damage | None:
    wrong = [m for m in known if m.crc is not None and crc_at(fd, m.offset, m.size) != m.crc]
    if not wrong:
        return None
    more = f" (and those of {len(wrong) - 1} more members)" if len(wrong) > 1 else ""
    return Damage(f"bytes changed{more}", wrong[0].name, wrong[0].offset)


def _elsewhere(path: Path, known: Sequence[Sum]) -> Damage:
    if known and known[0].crc is not None:
        return Damage("sha256 differs, though every member is as it was packed: the fault lies between them")
    name = f"{path.stem}{SUFFIX}"
    return Damage(f"sha256 differs; no {name} lies beside it, so the member that changed cannot be told")
