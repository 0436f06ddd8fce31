"""Small jobs beside a run, for what only a process on the cluster can do: it sees the run's folder."""

from __future__ import annotations

import sys
import time
from enum import Enum
from pathlib import Path

from orchestrator.cluster.lines import stack_end, stack_lines
from orchestrator.cluster.local import next_attempt
from orchestrator.cluster.ray.ask import ask_stacks
from orchestrator.cluster.stacks import main_thread

ASK = "stack-1"
NAP_S = 0.2


class Errand(Enum):
    """What is asked; the names are arguments of the job's command."""

    stacks = "stacks"
    """Print where every rank is."""
    now = "now"
    """Let the driver end without a save."""
    stop = "stop"
    """Let the ranks save and stop, and wait until they have: for the preStop hook of a pod that Ray's nodes live in."""


def now_file(folder: Path) -> Path:
    return folder / "now"


def run_errand(what: str, folder: Path) -> int:
    if Errand(what) is Errand.now:
        now_file(folder).touch()
        return 0
    if Errand(what) is Errand.stop:
        return _stop(folder / "stop")
    attempt = next_attempt(folder) - 1
    told = ask_stacks(folder, attempt)
    for rank, text in sorted(told.items()):
        sys.stdout.write(stack_lines(ASK, attempt, rank, main_thread(text)))
    sys.stdout.write(stack_end(ASK, attempt, 0, sorted(told)))
    return 0


def _stop(file: Path) -> int:
    """The first rank removes the file once all have saved, and the driver when it ends."""
    file.touch()
    while file.exists():
        time.sleep(NAP_S)
    return 0
