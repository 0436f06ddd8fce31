"""A loader's tree of processes: run and ended whole; what it has used, from /proc: processor seconds, own memory."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def run_and_end(
    command: list[str], folder: Path, timeout_s: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`; whatever it has started ends with it, not seconds later beside the next one.

    Raises TimeoutExpired.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | (environment or {}), start_new_session=True, stdout=out, stderr=err
        )  # files: a pipe would be open as long as an orphan has it
        try:
            code = process.wait(timeout_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


def tree(root: int) -> list[int]:
    """A process and its descendants."""
    parents = {pid: int(stat[1]) for pid, stat in _stats()}
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def cpu_s(root: int) -> float:
    """User and system seconds of a tree, those of its dead and awaited children included."""
    stats = dict(_stats())
    return sum(int(ticks) for pid in tree(root) if pid in stats for ticks in stats[pid][11:15]) / TICKS


def own_mib(root: int) -> float:
    """Anonymous and shared memory of a tree in MiB, shared pages counted once; without files in the page cache."""
    return sum(_own_kib(pid) for pid in tree(root)) / 1024


def started_s_ago(pid: int) -> float:
    """Seconds since a process was started."""
    started = int(next(stat for number, stat in _stats() if number == pid)[19]) / TICKS
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _own_kib(pid: int) -> int:
    kib = 0
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                kib += int(line.split()[1])
    return kib


def _stats() -> Iterator[tuple[int, list[str]]]:
    """(pid, fields of its stat from the state on) of every process."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                yield int(entry.name), Path(entry.path, "stat").read_text().rpartition(") ")[2].split()
