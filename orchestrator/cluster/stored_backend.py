"""Runs of an object store without the cluster that trains them: what can be read of them, and who does the rest."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from orchestrator.cluster.backend import LogLine
from orchestrator.cluster.local_backend import LocalBackend
from orchestrator.cluster.local_survey import survey_folder
from orchestrator.cluster.snapshot import Snapshot, now
from orchestrator.cluster.stored_runs import NoRun, StoredRuns, is_no_checkpoint
from orchestrator.errors import UserError

AT_ONCE = 8
"""Runs that are read at a time: each waits for its store most of it."""
TOLD = ("run.json", "logs/", "events/launcher.jsonl")
"""What the lines of a run are made of."""


class StoredBackend:
    """Implements `cluster.backend.Backend`."""

    def __init__(self, url: str):
        self._runs = StoredRuns(url)

    def ids(self) -> list[str]:
        return self._runs.ids()

    def runs(self) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [facts for facts in pool.map(self._facts_of_a_run, self.ids()) if facts is not None]

    def _facts_of_a_run(self, run_id: str) -> dict[str, Any] | None:
        """None for what is no run."""
        try:
            return self._runs.facts(run_id)
        except NoRun:
            return None

    def status(self, run_id: str) -> dict[str, Any]:
        return {**self._runs.facts(run_id), "where": [f"{self._runs.url}/{run_id}"]}

    def logs(self, run_id: str, follow: bool, rank: int | None) -> Iterator[LogLine]:
        if follow:
            self._refuse(run_id, "logs -f")
        with TemporaryDirectory() as scratch:
            self._runs.fetch(run_id, Path(scratch) / run_id, lambda name: name.startswith(TOLD))
            yield from LocalBackend(Path(scratch), lambda folder: 1).logs(run_id, False, rank)

    def pull(self, run_id: str, to: Path, checkpoints: bool = False) -> Path:
        self._runs.fetch(run_id, to / run_id, (lambda name: True) if checkpoints else is_no_checkpoint)
        return to / run_id

    def cancel(self, run_id: str, now: bool) -> None:
        self._refuse(run_id, "cancel")

    def resume(self, run_id: str) -> int | None:
        self._refuse(run_id, "resume")

    def stacks(self, run_id: str) -> dict[int, str]:
        self._refuse(run_id, "stack")

    def snapshot(self, run_id: str | None) -> Snapshot:
        if run_id is None:
            return Snapshot(now(), "local", self._runs.url)
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / run_id
            self._runs.fetch(run_id, folder, is_no_checkpoint)
            return survey_folder(folder, self._runs.facts(run_id), self._runs.url)

    def remove(self, run_id: str) -> None:
        self._refuse(run_id, "rm")

    def _refuse(self, run_id: str, verb: str) -> NoReturn:
        where = f"run {run_id} in {self._runs.url}/ is the record of one that a cluster runs"
        raise UserError(f"{where}. Way out: orchestrator {verb} {run_id} cluster=kubernetes")
