"""Downloaded shards of this machine: one copy for all its processes, no more than a cap, whole files or none.

Folders: `shards/` whole files, `partial/` files being filled, `stamps/` local shards that were checked. A writer locks
(flock) the file that it fills, so one that can be locked is a dead writer's leftover. A reader holds a shared lock, so
idle shards are known; those in use are evicted last, and their readers' descriptors keep them readable.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from orchestrator.data.index import Shard
from orchestrator.errors import ConfigError, DataError, NodeError, OrchestratorError
from orchestrator.files import sync_folder

GIB = 1 << 30
SHARE_OF_FREE = 0.75
POLL_S = 0.05


class _File(NamedTuple):
    path: Path
    size: int
    used: int  # ns


def cache_root() -> Path:
    """`$ORCHESTRATOR_CACHE`, else the user's cache folder."""
    root = os.environ.get("ORCHESTRATOR_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "orchestrator"


def name_of(shard: Shard) -> str:
    """By content where the index knows it: equal names in two sets are two files, equal files in two sets are one."""
    return shard.sha256 or hashlib.sha256(shard.location.encode()).hexdigest()


class Cache:
    """The cache of this machine, of at most `cap_gib` GiB; 0 means three quarters of what is free without it."""

    def __init__(self, cap_gib: float = 0.0):
        self.root, self._cap_gib = cache_root(), cap_gib
        self._shards, self._partial = self.root / "shards", self.root / "partial"

    def path(self, shard: Shard) -> Path:
        return self._shards / f"{name_of(shard)}.tar"

    def holds(self, shard: Shard) -> bool:
        """Whether the whole shard is there; marks it as used."""
        path = self.path(shard)
        try:
            if path.stat().st_size != shard.filesize:
                return False
            os.utime(path)
        except OSError:
            return False
        return True

    def obtain(self, shard: Shard, fill: Callable[[IO[bytes]], None]) -> bool:
        """Have the shard in the cache; whether this process filled it. Other processes that want it wait meanwhile.

        `fill` writes exactly `shard.filesize` checked bytes. Raises what it raises, NodeError, DataError.
        """
        with self._disk_errors(shard):
            self._make_folders()
            while not self.holds(shard):
                with self._claimed(f"{name_of(shard)}.tar") as file:
                    if file is None or self.holds(shard):
                        continue
                    self._reserve(file, shard)
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, self.path(shard))
                    sync_folder(self._shards)
                    return True
        return False

    def open(self, shard: Shard) -> int | None:
        """A descriptor of the shard that marks it as in use until it is closed; None where it was evicted meanwhile."""
        try:
            fd = os.open(self.path(shard), os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)
        return None

    def _make_folders(self) -> None:
        for folder in (self.root, self._shards, self._partial):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid not in (os.getuid(), 0):
                raise DataError(
                    f"{folder}: belongs to another user, who could change what is trained on. "
                    "Way out: set ORCHESTRATOR_CACHE to a folder of yours"
                )

    @contextmanager
    def _claimed(self, name: str) -> Iterator[IO[bytes] | None]:
        """The file to fill, locked; None where another process has finished or given up meanwhile."""
        path = self._partial / name
        with open(path, "r+b", opener=lambda name, _: os.open(name, os.O_RDWR | os.O_CREAT, 0o600)) as file:
            if not _lock_while_at(file.fileno(), path):
                yield None
                return
            try:
                yield file
            finally:
                if _is_at(file.fileno(), path):
                    path.unlink()

    def _reserve(self, file: IO[bytes], shard: Shard) -> None:
        """Give the file its final length once there is room for it, so that other processes count it in."""
        while True:
            with self._whole_cache():
                if self._make_room(shard, file):
                    os.ftruncate(file.fileno(), shard.filesize)
                    return
            time.sleep(POLL_S)  # what others are filling now can be evicted when it is whole

    @contextmanager
    def _whole_cache(self) -> Iterator[None]:
        fd = os.open(self._partial, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _make_room(self, shard: Shard, own: IO[bytes]) -> bool:
        self._clean(Path(own.name))
        whole, filling = _files(self._shards), _files(self._partial)
        used = sum(file.size for file in (*whole, *filling))
        free = shutil.disk_usage(self.root).free
        cap = int(self._cap_gib * GIB) or int(SHARE_OF_FREE * (free + used))
        if shard.filesize > cap:
            raise self._too_small(shard, cap)
        excess = max(used + shard.filesize - cap, shard.filesize - free)
        if excess <= _evict(whole, excess):
            return True
        if len(filling) == 1:  # its own: nobody else will give room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return False

    def _too_small(self, shard: Shard, cap: int) -> OrchestratorError:
        rule = f"one shard has {shard.filesize:,} bytes, the cache at {self.root} may take {cap:,}"
        way_out = "raise it, free space, or set ORCHESTRATOR_CACHE to another disk"
        if self._cap_gib:
            return ConfigError("data.cache_gib", f"{self._cap_gib:g}", rule, way_out)
        return NodeError(f"data.cache_gib = 0 (three quarters of what is free): {rule}. Way out: {way_out}")

    def _clean(self, own: Path) -> None:
        """Remove what writers that died left behind."""
        for path in self._partial.iterdir():
            if path != own:
                _remove_idle(path)

    @contextmanager
    def _disk_errors(self, shard: Shard) -> Iterator[None]:
        from orchestrator.redact import redact

        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            url = redact(shard.location)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NodeError(
                    f"{self._shards}: disk full while downloading {url}. "
                    "Way out: free space, a smaller data.cache_gib, or set ORCHESTRATOR_CACHE to another disk"
                ) from error
            raise DataError(
                f"{self._shards}: cannot keep {url} ({error}). Way out: set ORCHESTRATOR_CACHE to a writable folder"
            ) from error


def _lock_while_at(fd: int, path: Path) -> bool:
    """Lock the file that is being filled; False once it is no longer at its place.

    Tried again and again, not waited for: a file that became whole keeps its inode, and readers hold it for hours.
    """
    while _is_at(fd, path):
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _is_at(fd, path)
        time.sleep(POLL_S)
    return False


def _is_at(fd: int, path: Path) -> bool:
    """Whether this open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _files(folder: Path) -> list[_File]:
    found = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            facts = entry.stat()
            found.append(_File(Path(entry.path), facts.st_size, facts.st_mtime_ns))
    return found


def _remove_idle(path: Path) -> bool:
    """Remove a file that nobody reads or fills now; whether it went."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(fd, path):
            return False
        path.unlink()  # under the lock: who waits for it sees that the file is gone
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _evict(files: list[_File], excess: int) -> int:
    """Remove the longest unused files until `excess` bytes are gone, those in use last; returns how many bytes went."""
    gone, busy = 0, []
    by_age = sorted(files, key=lambda file: file.used)
    for file in by_age:
        if gone >= excess:
            return gone
        if _remove_idle(file.path):
            gone += file.size
        else:
            busy.append(file)
    for file in busy:
        if gone >= excess:
            break
        file.path.unlink(missing_ok=True)
        gone += file.size
    return gone
