"""Shards that lie elsewhere become local files: downloaded once per machine, checked, then shared by its processes."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path
from typing import IO

from orchestrator.data.index import Shard, require_size
from orchestrator.data.remote import is_url, open_url
from orchestrator.errors import DataError, NodeError, OrchestratorError, TransientError

TRIES = 3
PAUSE_S = 0.5
CHUNK = 1 << 20


def cache_dir() -> Path:
    """Where downloads stay: `$ORCHESTRATOR_CACHE`, else the user's cache folder."""
    root = os.environ.get("ORCHESTRATOR_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "orchestrator") / "shards"


def local_path(shard: Shard) -> Path:
    """The shard as a file of this machine, downloaded if need be; many processes may ask at once.

    Raises DataError where a local shard is missing or of another size, TransientError where a download fails.
    """
    if is_url(shard.location):
        return _cached(shard)
    path = Path(shard.location)
    if not path.is_file():
        raise DataError(
            f"{path}: this shard of the index does not exist. "
            f"Way out: copy it there, or `orchestrator shards index {path.parent}`"
        )
    require_size(path, shard)
    return path


def _cached(shard: Shard) -> Path:
    name = shard.sha256 or hashlib.sha256(shard.location.encode()).hexdigest()
    target = cache_dir() / f"{name}.tar"
    if not (target.is_file() and target.stat().st_size == shard.filesize):
        _download_with_retries(shard, target)
    return target


def _download_with_retries(shard: Shard, target: Path) -> None:
    for attempt in range(1, TRIES + 1):
        try:
            _download(shard, target)
            return
        except TransientError:
            if attempt == TRIES:
                raise
            time.sleep(PAUSE_S * 2**attempt)


def _download(shard: Shard, target: Path) -> None:
    """Fill a temporary file beside the target and rename it: a reader sees a whole shard or none."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            size, digest = _copy(shard.location, file)
            file.flush()
            os.fsync(file.fileno())
        _require_whole(shard, size, digest)
        temporary.replace(target)
    except OSError as error:
        raise _explain(error, shard.location, target.parent) from error
    finally:
        temporary.unlink(missing_ok=True)


def _copy(url: str, file: IO[bytes]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with open_url(url) as stream:
        while chunk := stream.read(CHUNK):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _explain(error: OSError, url: str, folder: Path) -> OrchestratorError:
    if error.errno is None:
        return TransientError(f"{url}: download failed ({error}). Way out: check the address and the network")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NodeError(f"{folder}: disk full while downloading {url}. Way out: free space or set ORCHESTRATOR_CACHE")
    return DataError(f"{folder}: cannot keep {url} ({error}). Way out: set ORCHESTRATOR_CACHE to a writable folder")


def _require_whole(shard: Shard, size: int, digest: str) -> None:
    if size != shard.filesize:
        raise TransientError(
            f"{shard.location}: {size:,} bytes came, the index says {shard.filesize:,}. "
            "Way out: try again; if it stays, `orchestrator shards index` over what is served now"
        )
    if shard.sha256 and digest != shard.sha256:
        raise DataError(
            f"{shard.location}: sha256 {digest}, the index says {shard.sha256}. "
            "Way out: put the shard there again, or `orchestrator shards index` over what is served now"
        )
