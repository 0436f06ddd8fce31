"""A folder that is being filled with shards: one writer at a time, and what a killed one finished is kept."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.data.index import INDEX_NAME
from orchestrator.errors import DataError
from orchestrator.files import write_json

PARTS = ".parts"


@contextmanager
def locked(out: Path, verb: str) -> Iterator[None]:
    """One writer per folder: the lock on the folder itself ends with the process and leaves nothing."""
    out.mkdir(parents=True, exist_ok=True)
    fd = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(
            f"{out}: another `{verb}` is writing here. Way out: wait for it, or name another folder"
        ) from None
    finally:
        os.close(fd)


def claim(folder: Path, digest: str, verb: str) -> None:
    """Make the folder ready for the set of this digest, keeping shards that an earlier start of the same one finished.

    Raises DataError where it holds another set.
    """
    folder.mkdir(exist_ok=True)
    index = read_or_none(folder / INDEX_NAME)
    marker = folder / PARTS / "plan.json"
    if index and index.get("plan") == digest:
        if _is_complete(folder, index):
            return
        (folder / INDEX_NAME).unlink()
        clear(folder)
    elif index or (not marker.is_file() and any(folder.glob("*.tar"))):
        raise DataError(
            f"{folder}: holds another shard set, which `{verb}` does not overwrite. "
            "Way out: name another folder or delete this one"
        )
    if (read_or_none(marker) or {}).get("digest") != digest:
        clear(folder)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    marker.parent.mkdir(exist_ok=True)
    write_json(marker, {"digest": digest})


def _is_complete(folder: Path, index: dict[str, Any]) -> bool:
    files = [(folder / shard["url"], shard["filesize"]) for shard in index["shardlist"]]
    return all(
        path.is_file() and path.stat().st_size == size and path.with_suffix(".idx").is_file() for path, size in files
    )


def finished_part(shard: Path, digest: str) -> dict[str, Any] | None:
    """The facts of a shard that is whole on disk and was written for this digest."""
    body = read_or_none(facts_path(shard))
    if not body or body["digest"] != digest:
        return None
    whole = shard.is_file() and shard.stat().st_size == body["filesize"] and shard.with_suffix(".idx").is_file()
    return body if whole else None


def facts_path(shard: Path) -> Path:
    return shard.parent / PARTS / f"{shard.stem}.json"


def read_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def clear(folder: Path) -> None:
    """Remove what an unfinished writer wrote."""
    for pattern in ("*.tar", "*.idx", "*.crc", ".*.tmp"):
        for path in folder.glob(pattern):
            path.unlink()
    shutil.rmtree(folder / PARTS, ignore_errors=True)
