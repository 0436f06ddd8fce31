"""Runs of this machine: their folders are the record, the lock on one names the process that runs it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cluster.backend import LogLine
from orchestrator.cluster.lock import holder, only_writer
from orchestrator.cluster.rank_logs import attempts_of, read_logs
from orchestrator.cluster.stacks import dump_stacks, is_stopped
from orchestrator.errors import UserError, nearest
from orchestrator.track.runs import load_run, read_events
from orchestrator.track.status import status_of
from orchestrator.track.words import exit_meaning, first_line
from orchestrator.train.heartbeat import heartbeat_file, read_sign
from orchestrator.train.stacks import stacks_file

if TYPE_CHECKING:
    from orchestrator.cluster.snapshot import Snapshot


class LocalBackend:
    """The runs below one folder."""

    def __init__(self, runs_dir: Path, start: Callable[[Path], int]):
        """`start`: runs what a folder's run.json says, to its end, and returns the exit code."""
        self._runs_dir, self._start = runs_dir, start

    def ids(self) -> list[str]:
        return [folder.name for folder in run_folders(self._runs_dir)]

    def runs(self) -> list[dict[str, Any]]:
        return [facts_of(folder) for folder in run_folders(self._runs_dir)]

    def status(self, run_id: str) -> dict[str, Any]:
        return facts_of(self._folder(run_id))

    def logs(self, run_id: str, follow: bool, rank: int | None) -> Iterator[LogLine]:
        folder = self._folder(run_id)
        lines = read_logs(folder, rank, lambda: follow and holder(folder) is not None)
        return lines if rank is not None else _with_faults(lines, folder)

    def cancel(self, run_id: str, now: bool) -> None:
        """SIGTERM lets the ranks save; they die with a launcher that is killed."""
        launcher = self._launcher(run_id)
        try:
            os.kill(launcher, signal.SIGKILL if now else signal.SIGTERM)
        except PermissionError:
            who = f"run {run_id} is process {launcher} of another user"
            raise UserError(f"{who}, which this one may not stop. Way out: ask them") from None

    def resume(self, run_id: str) -> int:
        folder = self._folder(run_id)
        launcher = holder(folder)
        if launcher is not None:
            raise UserError(f"run {run_id} is running as process {launcher}. Way out: orchestrator logs {run_id} -f")
        return self._start(folder)

    def pull(self, run_id: str, to: Path, checkpoints: bool = False) -> Path:
        folder = self._folder(run_id)
        raise UserError(f"run {run_id} is on this machine: {folder}. Way out: cp -r {folder} {to}")

    def stacks(self, run_id: str) -> dict[int, str]:
        self._launcher(run_id)
        folder = self._folder(run_id)
        attempt = attempts_of(folder)[-1] if attempts_of(folder) else 0
        pids = rank_pids(folder, attempt)
        stopped = {rank for rank, pid in pids.items() if is_stopped(pid)}
        found = dump_stacks(folder, attempt, {rank: pid for rank, pid in pids.items() if rank not in stopped})
        told = {rank: "\n".join(stack.frames) or NO_ANSWER for rank, stack in found.items()}
        return dict(sorted({**told, **{rank: STOPPED.format(pid=pids[rank]) for rank in stopped}}.items()))

    def snapshot(self, run_id: str | None) -> Snapshot:
        from orchestrator.cluster.local_survey import survey

        return survey(self._runs_dir, run_id and self._folder(run_id).name)

    def remove(self, run_id: str) -> None:
        """Here the folder is all that there is of a run."""
        folder = self._folder(run_id)
        launcher = holder(folder)
        if launcher is not None:
            raise UserError(f"run {run_id} is running as process {launcher}. Way out: orchestrator cancel {run_id}")
        with only_writer(folder):
            shutil.rmtree(folder)

    def _folder(self, run_id: str) -> Path:
        folder = self._runs_dir / run_id
        if not (folder / "run.json").exists():
            hint = nearest(run_id, self.ids()) if self.ids() else "there is none at all"
            raise UserError(f"ID {run_id} is no run in {self._runs_dir}/: {hint} Way out: orchestrator ls")
        return folder

    def _launcher(self, run_id: str) -> int:
        """The process that runs it. Raises UserError where none does."""
        folder = self._folder(run_id)
        launcher = holder(folder)
        if launcher is None:
            state = facts_of(folder)["state"]
            raise UserError(f"run {run_id} is not running here ({state}). Way out: orchestrator status {run_id}")
        return launcher


NO_ANSWER = "no stack: its interpreter did not answer"
STOPPED = "stopped by a signal, so it does not answer; `kill -CONT {pid}` lets it go on"


def _with_faults(lines: Iterator[LogLine], folder: Path) -> Iterator[LogLine]:
    """After the lines of an attempt what the launcher found wrong with it, and at last how the run ended."""
    behind = 0
    for line in lines:
        for attempt in range(behind, line.attempt):
            yield from _said_of(folder, attempt)
        behind = line.attempt
        yield line
    for attempt in range(behind, max(attempts_of(folder), default=-1) + 1):
        yield from _said_of(folder, attempt)


def _said_of(folder: Path, attempt: int) -> Iterator[LogLine]:
    events = read_events(folder / "events" / "launcher.jsonl")
    texts = [text for event in events if event["attempt"] == attempt and (text := _in_words(event))]
    yield from (LogLine(attempt, None, number, text) for number, text in enumerate(texts, start=1))


def _in_words(event: dict[str, Any]) -> str | None:
    if event["kind"] == "end":
        return f"the run ended with {event['exit_code']}: {exit_meaning(event['exit_code'])}"
    if event["kind"] != "fault":
        return None
    where = f"rank {event['rank']}: " if event["rank"] is not None else ""
    place = f", phase {event['phase']}, step {event['step']}" if event["phase"] else ""
    return f"{where}{first_line(event['error'])}{place}"


def run_folders(runs_dir: Path) -> list[Path]:
    """Folders of runs, the one that was touched last at the end."""
    return sorted((path.parent for path in runs_dir.glob("*/run.json")), key=_touched)


def _touched(folder: Path) -> float:
    times = [path.stat().st_mtime for path in (folder / "run.json", *folder.glob("events/*.jsonl")) if path.exists()]
    return max(times, default=0.0)


def facts_of(folder: Path) -> dict[str, Any]:
    """The record's facts, and what only a living rank shows: its phase, step and silence."""
    launcher = holder(folder)
    facts = status_of(load_run(folder), launcher, time.time())
    ranks = living_ranks(folder, facts["attempt"]) if launcher else {}
    step = min((rank["step"] for rank in ranks.values()), default=0)  # newer than the last logged one
    where = [f"process {launcher}"] if launcher else []
    return {**facts, "step": max(step, facts["step"]), "ranks": ranks, "where": where}


def living_ranks(folder: Path, attempt: int) -> dict[int, dict[str, Any]]:
    """By rank, the phase and step of its newest sign of life and the seconds since then."""
    found = {}
    for path in sorted(folder.glob(f"logs/attempt_{attempt}/rank_*.heartbeat")):
        sign = read_sign(path)
        if sign is not None:
            silent = round(time.monotonic() - sign.t, 1)
            found[int(path.stem.removeprefix("rank_"))] = {"phase": sign.phase, "step": sign.step, "silent_s": silent}
    return found


def rank_pids(folder: Path, attempt: int) -> dict[int, int]:
    """Processes of the living ranks of this machine: those that a sign of life names and that keep their stacks' file
    open, so that no other process that got the number is taken for one."""
    found = {}
    for path in folder.glob(f"logs/attempt_{attempt}/rank_*.heartbeat"):
        rank = int(path.stem.removeprefix("rank_"))
        sign = read_sign(heartbeat_file(folder, attempt, rank))
        if sign is not None and _has_open(sign.pid, stacks_file(folder, attempt, rank).resolve()):
            found[rank] = sign.pid
    return found


def _has_open(pid: int, path: Path) -> bool:
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            if link.readlink() == path:
                return True
    return False
