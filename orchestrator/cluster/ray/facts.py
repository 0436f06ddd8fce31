"""Where a run stands, from what Ray tells of its jobs, from its folder where this machine has it, else from its log."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.cluster.lines import last_words, parse
from orchestrator.cluster.ray.submit import BUNDLE_KEY, FOLDER_KEY, RUN_KEY, bundle_of
from orchestrator.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_TERMINATED
from orchestrator.track.runs import RunRecord, load_run
from orchestrator.track.status import status_of

Job = Mapping[str, Any]
STOPS = (EXIT_STOPPED, EXIT_INTERRUPTED, EXIT_TERMINATED)
TOLD = ("attempt", "world_size", "step", "total_steps", "epoch", "eta_s", "images_per_s", "goodput")


def state_of(job: Job) -> str:
    """queued, running, stopped, done or failed."""
    status = job["status"]
    if status == "FAILED":
        return "stopped" if last_words(job.get("message") or "").get("exit_code") in STOPS else "failed"
    return {"PENDING": "queued", "RUNNING": "running", "STOPPED": "stopped", "SUCCEEDED": "done"}[status]


def facts_of(jobs: Sequence[Job], folder: Path | None, log: str = "") -> dict[str, Any]:
    """As `track.status.status_of`; what is not known is None. `jobs`: of one run; `folder`: where it is here, too."""
    last = jobs[-1]
    state, words = state_of(last), last_words(last.get("message") or log)
    alive = 0 if state in ("queued", "running") else None
    if folder is not None:
        facts = status_of(load_run(folder), alive, time.time())
    else:
        told = newest_facts(log)
        known = {**dict.fromkeys(_unknown(last)), **{key: told.get(key) for key in TOLD}}
        facts = {**known, **{key: words[key] for key in ("attempt", "step") if key in words}}
    exit_code = words.get("exit_code", EXIT_DONE if state == "done" else None)
    return {
        **facts,
        "run_id": last["metadata"][RUN_KEY],
        "state": state,
        "launcher": None,
        "exit_code": None if alive is not None else facts.get("exit_code") or exit_code,
        "error": words.get("error") or _said(last, words),
        "folder": last["metadata"][FOLDER_KEY],
    }


def newest_facts(log: str) -> dict[str, Any]:
    """Of the last line of progress in a job's log."""
    for line in reversed(log.split("\n")):
        if " progress] " in line and (said := parse(line)) and said.kind == "progress":
            return said.facts
    return {}


def _said(job: Job, words: Mapping[str, Any]) -> str | None:
    """Why a job failed that left no last words: its driver never came so far."""
    if job["status"] != "FAILED" or words:
        return None
    return (job.get("message") or "no word of it").strip()[-1000:]


def _unknown(job: Job) -> dict[str, Any]:
    """The facts of a run of which nothing but its bundle is known."""
    bundle = bundle_of(job) if BUNDLE_KEY in job["metadata"] else {}
    return status_of(RunRecord(Path(job["metadata"][FOLDER_KEY]), bundle), None, time.time())
