"""One writer a run: a lock on its folder that the system drops when its holder ends, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.files import disk_errors


class AlreadyRunning(UserError):
    """Somebody else holds the run."""


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the run. Raises AlreadyRunning that names the process which holds it already."""
    path = folder / "lock"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode().strip() or "unknown"
            raise AlreadyRunning(
                f"run {folder.name} is already running as process {holder}. Way out: wait for it, stop it with "
                f"`kill {holder}`, or start another run with name=... or another seed"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def holder(folder: Path) -> int | None:
    """The process that holds the run, None where the lock is free; asks the system and leaves the lock alone."""
    path = folder / "lock"
    with suppress(OSError, ValueError):
        number, pid = path.stat().st_ino, path.read_text().strip()
        for line in Path("/proc/locks").read_text().splitlines():
            kind, *_, holder_pid, place = line.split()[1:6]
            if kind == "FLOCK" and holder_pid == pid and place.endswith(f":{number}"):
                return int(pid)
    return None
