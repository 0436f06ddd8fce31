"""Whole files or none: atomic writes, and the errors of a full or closed disk by their own names."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import NodeError, UserError

CLOSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into NodeError (44) and a closed one into UserError (42), naming the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NodeError(
                f"{path}: disk full. Way out: free space, or write to another disk (runs_dir=... for runs); "
                "the same command goes on"
            ) from error
        if error.errno in CLOSED:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}). Way out: mend what stands in the way, or write to a "
                "folder of yours (runs_dir=... for runs)"
            ) from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside `path` that takes its place, synced, when the block ends well, and is removed else."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):  # the folder itself may be what failed, and that error is the one to show
            temporary.unlink()


def ends_torn(path: Path) -> bool:
    """Whether a file of lines ends amid one, as a killed writer leaves it."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def remove_halves(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; none may be writing to this folder now."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


def write_atomic(path: Path, content: bytes) -> None:
    """Write a whole file or none. Raises what `disk_errors` makes of a failing disk."""
    with disk_errors(path), replacing(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file; UserError where it is missing or torn."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Way out: check the path or the run id") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}). Way out: submit again, or restore the file"
        ) from None


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
