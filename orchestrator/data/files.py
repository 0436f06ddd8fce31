"""Files that appear whole or not at all, and what a failing disk means to the user."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import DataError, NodeError, OrchestratorError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside `path` that takes its place, synced, when the block ends well, and is removed else."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, body: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(body, indent=1, ensure_ascii=False).encode() + b"\n")


def explain_disk(error: OSError, folder: Path) -> OrchestratorError:
    """The error to raise in place of an OSError that writing into `folder` caused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NodeError(f"{folder}: disk full. Way out: free space or name another folder; the same command goes on")
    return DataError(f"{folder}: not writable ({error.strerror or error}). Way out: name a folder that you may write")
