"""How a group of ranks ended, and which of its failures the others followed from."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_NO_PROGRESS,
    EXIT_NODE,
    EXIT_RESIZED,
    EXIT_STOPPED,
    EXIT_TERMINATED,
    EXIT_TRANSIENT,
    EXIT_USER,
)

FINAL = {EXIT_DONE, EXIT_USER, EXIT_NO_PROGRESS, EXIT_STOPPED, EXIT_INTERRUPTED, EXIT_TERMINATED}
"""Exit codes after which this machine does not start the run again by itself."""
ORDERLY = {EXIT_DONE, EXIT_STOPPED, EXIT_RESIZED, EXIT_INTERRUPTED, EXIT_TERMINATED}
"""Exit codes of a rank that all ranks agreed on."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a group of ranks ended: the exit code, and the first true cause where it failed."""

    exit_code: int
    rank: int | None = None
    error: str | None = None
    traceback: str | None = None
    signal: int | None = None
    """That killed the rank."""
    by_itself: bool = False
    """Whether the run failed by itself: not by a signal from outside, the network or the machine."""
    lost_device: bool = False
    """Whether the rank's device is unfit."""
    hung: bool = False


def is_failure(code: int) -> bool:
    """Whether a rank's exit code means that its peers wait in vain."""
    return code not in ORDERLY


def orderly_end(codes: Iterable[int]) -> Ended:
    """The end that all ranks agreed on."""
    return Ended(next((code for code in codes if code), EXIT_DONE))


def left_errors(folder: Path, attempt: int) -> list[dict[str, Any]]:
    """What failing ranks of an attempt wrote down."""
    errors = []
    for path in (folder / "logs" / f"attempt_{attempt}").glob("rank_*.error.json"):
        with suppress(OSError, ValueError):
            errors.append(json.loads(path.read_text()))
    return errors


def first_cause(codes: dict[int, int], errors: list[dict[str, Any]], out_of_memory: bool = False) -> Ended:
    """The failure that the others followed from.

    `codes`: exit codes by rank of those that ended by themselves, negative for a signal. A rank that a signal killed
    says nothing, and its peers' broken connections come later; else the earliest error is the cause.
    `out_of_memory`: whether the kernel killed a process of this machine's group for its memory meanwhile.
    """
    spoken = {error["rank"] for error in errors}
    for rank, code in sorted(codes.items()):
        if code < 0 and rank not in spoken:
            return UNSAVED_END.get(code) or killed(rank, -code, out_of_memory)
    if errors:
        return _told(min(errors, key=lambda error: error["t"]))
    rank, code = min((rank, code) for rank, code in codes.items() if code not in ORDERLY)
    if code in FINAL:
        return Ended(code)
    return Ended(code, rank, f"ended with code {code}", by_itself=_is_own(code))


UNSAVED_END = {-signal.SIGTERM: Ended(EXIT_TERMINATED), -signal.SIGINT: Ended(EXIT_INTERRUPTED)}
"""A request to stop that met a rank before it could listen: nothing was computed that had to be saved."""


def killed(rank: int, number: int, out_of_memory: bool) -> Ended:
    """The end of a rank by a signal. Who sent SIGKILL cannot be seen; the kernel counts what it kills for memory."""
    starved = out_of_memory and number == signal.SIGKILL
    error = f"killed by {signal_name(number)}" + (" because memory ran out" if starved else "")
    own = starved or number not in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return Ended(128 + number, rank, error, signal=number, by_itself=own)


def _told(error: dict[str, Any]) -> Ended:
    code = error["exit_code"]
    lost = error.get("kind") == "DeviceError"
    return Ended(code, error["rank"], error["error"], error["traceback"], by_itself=_is_own(code), lost_device=lost)


def _is_own(code: int) -> bool:
    return code not in (EXIT_NODE, EXIT_TRANSIENT)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def out_of_memory_kills(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Processes of this control group that the kernel has killed for memory so far; 0 where it does not tell."""
    for name in ("memory.events", "memory/memory.oom_control"):
        with suppress(OSError):
            for line in (root / name).read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
    return 0
