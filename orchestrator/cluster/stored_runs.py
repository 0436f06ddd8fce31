"""Runs whose record is in an object store, as somebody reads them who has none of their machines: files come here."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.cluster.claim import POINTER
from orchestrator.cluster.stored import place_of
from orchestrator.errors import CheckpointError, ConfigError, TransientError, UserError
from orchestrator.files import write_json
from orchestrator.redact import redact
from orchestrator.track.runs import load_run
from orchestrator.track.status import status_of
from orchestrator.track.words import duration
from orchestrator.train.bucket import Bucket, StoreError
from orchestrator.train.checkpoint import LATEST, MANIFEST, SCHEMA, open_checkpoint

log = logging.getLogger(__name__)
MARKS = ".store.json"
"""Beside files that came from a store: what marks each of them there, so that it comes again only if it changed."""
CHECKPOINT = re.compile(r"checkpoints/(?P<step>step_\d{8})\.g(?P<generation>\d{4})/(?P<file>[^/]+)")
RECORD = ("run.json", "result.json", "evaluation.json", "events/")
"""What tells where a run stands."""
Wanted = Callable[[str], bool]


class NoRun(UserError):
    """The store has something else under that name."""


class StoredRuns:
    """Runs below one address; the keys are this process's own, of `cluster.store_secret` or the environment."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def ids(self) -> list[str]:
        """Of everything there that may be a run."""
        with self._opened("") as bucket:
            return bucket.folders()

    def fetch(self, run_id: str, target: Path, wanted: Wanted) -> None:
        """Have those files of a run here that are wanted, checkpoints under their plain names.

        Raises UserError where there is no such run, ConfigError where the store refuses, TransientError where it does
        not answer.
        """
        with self._opened(run_id) as bucket:
            there = bucket.entries()
            if "run.json" not in there and POINTER not in there:
                raise NoRun(f"ID {run_id} is no run in {redact(self.url)}/. Way out: orchestrator ls")
            names = plain_names(there)
            _bring(bucket, target, {key: name for key, name in names.items() if wanted(name)}, there)

    def facts(self, run_id: str) -> dict[str, Any]:
        """Where the run stands by its record alone, as `track.status.status_of`."""
        with TemporaryDirectory() as scratch:
            self.fetch(run_id, Path(scratch), is_record)
            run, now = load_run(Path(scratch)), time.time()
            facts = status_of(run, None, now)
        if facts["state"] == "dead":  # nobody here can tell
            told = max((event["t"] for event in (*run.events, *run.launcher)), default=now)
            reason = f"says its record, which was written {duration(now - told)} ago; its cluster knows more"
            facts |= {"state": "running", "reason": reason}
        web = str(facts["wandb"] or "").startswith("http")
        page = facts["wandb"] if web else None
        return {**facts, "run_id": run_id, "folder": f"{redact(self.url)}/{run_id}", "wandb": page}

    @contextmanager
    def _opened(self, run_id: str) -> Iterator[Bucket]:
        bucket = Bucket(f"{self.url}/{run_id}" if run_id else self.url)
        try:
            yield bucket
        except StoreError as error:
            text = redact(str(error))
            if error.passing:
                raise TransientError(f"{text}. Way out: try again once the store answers") from None
            way_out = "mend the address, the keys in the environment (or cluster.store_secret=/FILE) or their rights"
            raise ConfigError("runs_dir", redact(self.url), text, way_out) from None
        finally:
            bucket.close()


def is_record(name: str) -> bool:
    return name.startswith(RECORD)


def is_no_checkpoint(name: str) -> bool:
    return not name.startswith("checkpoints/")


def plain_names(keys: Mapping[str, Any]) -> dict[str, str]:
    """The file in a run's folder that each key stands for: of a checkpoint's generations the last whole one. Pure."""
    names, newest = {}, dict[str, str]()
    for key in sorted(keys):
        found = CHECKPOINT.fullmatch(key)
        if found is None:
            names[key] = key
        elif found["file"] == MANIFEST:
            newest[found["step"]] = found["generation"]
    for key in keys:
        found = CHECKPOINT.fullmatch(key)
        if found and newest.get(found["step"]) == found["generation"]:
            names[key] = f"checkpoints/{found['step']}/{found['file']}"
    return {key: name for key, name in names.items() if key not in (POINTER, f"checkpoints/{LATEST}")}


def _bring(bucket: Bucket, target: Path, names: Mapping[str, str], there: Mapping[str, tuple[int, str]]) -> None:
    marks = _marks(target)
    try:
        for key, name in names.items():
            path, mark = place_of(target, name), f"{key} {there[key][1]}"
            if marks.get(name) == mark and path.is_file() and path.stat().st_size == there[key][0]:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            coming = path.with_name(f".{path.name}.coming.tmp")
            if bucket.get_file(key, coming):
                os.replace(coming, path)
                marks[name] = mark
    finally:
        if marks:
            write_json(target / MARKS, marks)
    _verify({path.split("/")[1] for path in names.values() if path.startswith("checkpoints/")}, target)


def _marks(target: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        return json.loads((target / MARKS).read_bytes())
    return {}


def _verify(steps: set[str], target: Path) -> None:
    """Only checkpoints that came whole stay, and the pointer beside them names the last."""
    for step in sorted(steps):
        folder = target / "checkpoints" / step
        try:
            found = open_checkpoint(folder)
        except CheckpointError as error:
            log.warning("a checkpoint in the store is not whole and stays there: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
            continue
        write_json(target / "checkpoints" / LATEST, {"schema": SCHEMA, "step": found.step, "folder": step})
