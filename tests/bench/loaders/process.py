"""What a tree of processes has used, from /proc: processor seconds, and memory that is its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


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
