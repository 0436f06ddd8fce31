"""A shard as a file of this machine: found where it lies, or downloaded and checked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import IO

from orchestrator.data.cache import Cache
from orchestrator.data.damage import Damage, DamagedShard, find_damage, known_members
from orchestrator.data.index import Shard, require_size
from orchestrator.data.remote import is_url
from orchestrator.data.sums import SUFFIX, Sum, parse_sums
from orchestrator.data.transfer import Shorter, Transfer, read_all
from orchestrator.errors import DataError, TransientError
from orchestrator.redact import redact

WHOLE_TRIES = 2
"""Downloads of a shard whose sha256 is another one: the second tells a faulty line from a faulty file."""

Counted = Callable[[int, int], None]
"""(bytes, retries) of a download that ended."""


def local_path(shard: Shard, cache_gib: float = 0.0) -> Path:
    """The shard as a file of this machine, downloaded if need be; many processes may ask at once.

    A local one is judged by its length only. Raises DataError where it is missing or longer, DamagedShard where it is
    shorter or other bytes are served, TransientError where a download fails, NodeError where the disk is full.
    """
    if is_url(shard.location):
        cache = Cache(cache_gib)
        download(shard, cache, lambda size, retries: None)
        return cache.path(shard)
    path = Path(shard.location)
    require_present(path, shard)
    return path


def require_present(path: Path, shard: Shard) -> None:
    """Raise DataError where a local shard is missing or longer than in the index, DamagedShard where it is shorter."""
    if not path.is_file():
        raise DataError(
            f"{path}: this shard of the index does not exist. "
            f"Way out: copy it there, or `orchestrator shards index {path.parent}`"
        )
    if path.stat().st_size < shard.filesize:
        raise DamagedShard(shard, find_damage(path, shard, known_members(path)))
    require_size(path, shard)


def download(shard: Shard, cache: Cache, count: Counted, stop: Event | None = None) -> bool:
    """Have a remote shard in the cache; whether this process fetched it. Raises as `local_path` does."""

    def fill(file: IO[bytes]) -> None:
        _fetch(shard, file, count, stop or Event())

    return cache.obtain(shard, fill)


def _fetch(shard: Shard, file: IO[bytes], count: Counted, stop: Event) -> None:
    """Fill the file with the shard's bytes, checked by length and sha256."""
    for last in range(WHOLE_TRIES):
        file.seek(0)
        transfer = Transfer(shard.location, file, shard.filesize, stop)
        try:
            digest = transfer.run()
        except Shorter as error:
            raise _of_other_length(shard, file, int(error.args[0])) from None
        finally:
            count(transfer.got, transfer.retries + bool(last))
        if not shard.sha256 or digest == shard.sha256:
            return
    file.flush()
    raise DamagedShard(shard, find_damage(Path(file.name), shard, served_members(shard)))


def _of_other_length(shard: Shard, file: IO[bytes], served: int) -> DataError:
    if served < shard.filesize:
        file.flush()
        file.truncate(served)
        return DamagedShard(shard, find_damage(Path(file.name), shard, served_members(shard)))
    return DataError(
        f"index stale: {redact(shard.location)}: {served:,} bytes came, the index says {shard.filesize:,}. "
        "Way out: `orchestrator shards index` over what is served now"
    )


def served_members(shard: Shard) -> list[Sum]:
    """What lies beside a remote shard about its members: its sums, else its `.idx`, else nothing."""
    stem = shard.location.removesuffix(".tar")
    if stem == shard.location:  # an address with a query, or another name
        return []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (SUFFIX, ".idx"):
            try:
                content = read_all(stem + suffix)
            except (DataError, TransientError):
                continue
            if suffix == SUFFIX and parse_sums(content) is None:
                continue
            path = Path(folder) / f"shard{suffix}"
            path.write_bytes(content)
            return known_members(path)
    return []


def damage_of(path: Path, shard: Shard) -> DamagedShard:
    """The error for a local shard whose sha256 is another one."""
    return DamagedShard(shard, find_damage(path, shard, known_members(path)))


__all__ = ["Damage", "DamagedShard", "damage_of", "download", "local_path", "require_present"]
