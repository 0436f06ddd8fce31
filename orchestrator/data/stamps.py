"""Local shards that were read and hashed once on this machine, so that later opens, processes and epochs need not.

A text file per folder of shards in the cache's `stamps/`: lines `SIZE MTIME_NS INODE SHA256 NAME`, the last of a name
counts. A file that changed has another size, time or inode, and is hashed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.data.cache import cache_root
from orchestrator.files import hash_file

_Facts = tuple[int, int, int]  # size, mtime_ns, inode

log = logging.getLogger(__name__)


class Stamps:
    """What is known of local shards; one per process, shared through files."""

    def __init__(self):
        self._root = cache_root() / "stamps"
        self._known: dict[Path, tuple[_Facts, str]] = {}
        self._read: dict[Path, int] = {}
        self.hashed = 0
        """Bytes that this process hashed."""

    def sha256(self, path: Path) -> str:
        """The hash of a local file as it is now; of several processes that want it, one reads it. Raises OSError."""
        facts = _facts(path)
        known = self._lookup(path, facts)
        if known:
            return known
        with _alone(path):
            return self._lookup(path, facts) or self._hash(path, facts)

    def _lookup(self, path: Path, facts: _Facts) -> str | None:
        if self._known.get(path, (None,))[0] != facts:
            self._load(path.parent)
        found = self._known.get(path)
        return found[1] if found and found[0] == facts else None

    def _load(self, folder: Path) -> None:
        """Read what was added to the folder's file since the last time."""
        try:
            with self._file(folder).open("rb") as file:
                file.seek(self._read.get(folder, 0))
                content = file.read()
        except OSError:
            return
        whole = content[: content.rfind(b"\n") + 1]  # the last line may be half written
        self._read[folder] = self._read.get(folder, 0) + len(whole)
        for line in whole.decode(errors="surrogateescape").splitlines():
            with suppress(ValueError):
                size, mtime, inode, digest, name = line.split(" ", 4)
                self._known[folder / name] = (int(size), int(mtime), int(inode)), digest

    def _hash(self, path: Path, facts: _Facts) -> str:
        digest = hash_file(path)
        self.hashed += facts[0]
        if _facts(path) != facts:  # it is being written: what was read is of no moment in time
            return digest
        self._known[path] = facts, digest
        line = f"\n{' '.join(map(str, facts))} {digest} {path.name}\n"  # the first \n ends a line that a kill cut
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self._file(path.parent), "ab", buffering=0) as file:
                file.write(line.encode(errors="surrogateescape"))
        except OSError as error:
            log.debug("%s: not noted as checked (%s), the next process reads it again", path, error)
        return digest

    def _file(self, folder: Path) -> Path:
        return self._root / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.txt"


def _facts(path: Path) -> _Facts:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the file's lock, where its file system has locks for readers."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
