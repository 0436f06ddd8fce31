"""The shards of a run as one loader process reads them: checked at first use, fetched ahead, counted."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple

from orchestrator.data.cache import Cache
from orchestrator.data.damage import DamagedShard
from orchestrator.data.fetch import damage_of, download, require_present
from orchestrator.data.index import Shard
from orchestrator.data.remote import is_url
from orchestrator.data.stamps import Stamps
from orchestrator.errors import DataError, TransientError
from orchestrator.redact import redact

THREADS = 2
MOST_AHEAD = 4
OPEN_TRIES = 10


class Counts(NamedTuple):
    """What reading cost since the last taking; adds up over batches, processes and ranks."""

    shards: int = 0
    """Fetched from elsewhere by this process."""
    bytes: int = 0
    retries: int = 0
    quarantined_shards: int = 0
    """Newly found damaged by this process; each loader process finds them for itself."""
    quarantined_samples: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(mine + its for mine, its in zip(self, other, strict=True)))


class ShardStore:
    """Finds, checks and fetches shards for one process; picklable, threads start at the first `ahead`."""

    def __init__(self, cache_gib: float = 0.0, check: bool = True):
        """`check=False` trusts local shards of the right length."""
        self._cache, self._check = Cache(cache_gib), check
        self._start()

    def _start(self) -> None:
        self._stamps, self._lock, self._stop = Stamps(), Lock(), Event()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[Shard, Future[Path]] = {}
        self._process = os.getpid()
        self.counts = Counts()

    def __getstate__(self) -> dict[str, Any]:
        return {"_cache": self._cache, "_check": self._check}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def path(self, shard: Shard) -> Path:
        """The shard as a checked file of this machine; waits for it where it is being fetched.

        Raises DamagedShard where its bytes are not those of the index, DataError where it is missing, TransientError
        where a download fails, NodeError where the disk is full.
        """
        self._begin_anew_after_a_fork()
        coming = self._coming.pop(shard, None)
        if coming:
            coming.result()  # its error, if it had one; the file may have been evicted since
        return self._ready(shard)

    def open(self, shard: Shard) -> tuple[Path, int]:
        """The checked shard, and a descriptor of it that stays readable whatever becomes of the file."""
        for _ in range(OPEN_TRIES):
            path = self.path(shard)
            fd = self._cache.open(shard) if is_url(shard.location) else os.open(path, os.O_RDONLY)
            if fd is not None:
                return path, fd
        raise TransientError(
            f"{redact(shard.location)}: evicted {OPEN_TRIES} times before it could be opened. "
            "Way out: raise data.cache_gib; it should hold a few shards for each loader process"
        )

    def ahead(self, shards: Iterable[Shard]) -> None:
        """Begin to fetch and check the shards that are read next, few at a time; errors surface at `path`."""
        self._begin_anew_after_a_fork()
        for shard in shards:
            if shard in self._coming:
                continue
            if len(self._coming) >= MOST_AHEAD:  # what is ready needs no place, although nobody asked for it
                self._coming = {shard: future for shard, future in self._coming.items() if not future.done()}
            if len(self._coming) >= MOST_AHEAD:
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(THREADS, "shards")
            self._coming[shard] = self._pool.submit(self._ready, shard)

    def take_counts(self) -> Counts:
        """What was counted since the last call."""
        with self._lock:
            taken, self.counts = self.counts, Counts()
        return taken

    def add(self, counts: Counts) -> None:
        with self._lock:
            self.counts = self.counts.plus(counts)

    def close(self) -> None:
        """End what is being fetched."""
        self._stop.set()
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)  # a stalled server would hold it for half a minute
            self._pool = None
        self._coming.clear()

    def _begin_anew_after_a_fork(self) -> None:
        """Threads and locks of the parent are not there in its child."""
        if self._process != os.getpid():
            self._start()

    def _ready(self, shard: Shard) -> Path:
        if is_url(shard.location):
            if download(shard, self._cache, self._count, self._stop):
                self.add(Counts(shards=1))
            return self._cache.path(shard)
        path = Path(shard.location)
        require_present(path, shard)
        if self._check and shard.sha256 and self._sha256(path) != shard.sha256:
            raise damage_of(path, shard)
        return path

    def _sha256(self, path: Path) -> str:
        try:
            return self._stamps.sha256(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}). Way out: mend the disk or the rights"
            ) from error

    def _count(self, size: int, retries: int) -> None:
        self.add(Counts(bytes=size, retries=retries))


__all__ = ["Counts", "DamagedShard", "ShardStore"]
