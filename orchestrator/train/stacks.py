"""A rank's Python stacks on demand, by a signal handler in C that runs whoever holds the interpreter."""

from __future__ import annotations

import faulthandler
import signal
from contextlib import suppress
from pathlib import Path
from typing import IO

STACKS_SIGNAL = signal.SIGUSR2


def stacks_file(folder: Path, attempt: int, rank: int) -> Path:
    return folder / "logs" / f"attempt_{attempt}" / f"rank_{rank}.stacks"


def tell_stacks(path: Path) -> IO[str]:
    """Write the stacks of all threads to this file at each STACKS_SIGNAL, and those of a crash; the caller keeps it
    open and gives it to `stop_telling`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)
    faulthandler.enable(file=file, all_threads=False)
    return file


def stop_telling(file: IO[str]) -> None:
    """The rank ends: a file without a stack is removed."""
    with suppress(OSError, ValueError):
        faulthandler.disable()
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)
        file.close()
        path = Path(file.name)
        if path.stat().st_size == 0:
            path.unlink()
