"""A snapshot of this machine with one of its runs, or of a run whose folder was fetched to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.cluster.kubernetes.trimmed import clean
from orchestrator.cluster.local_backend import facts_of
from orchestrator.cluster.snapshot import Snapshot, now
from orchestrator.cluster.testimony import testimony_of


def survey(runs_dir: Path, run_id: str | None = None) -> Snapshot:
    """The folder of a run, and the machine that it lies on."""
    taken = Snapshot(now(), "local", str(runs_dir), run_id=run_id, objects={"Machine": [_machine(runs_dir)]})
    folder = runs_dir / (run_id or "")
    return taken if run_id is None else replace(taken, record=clean(testimony_of(folder, facts_of(folder))))


def survey_folder(folder: Path, facts: Mapping[str, Any], place: str) -> Snapshot:
    """`facts`: where the run stands, from where its folder came; `place`: that address."""
    return Snapshot(now(), "local", place, run_id=folder.name, record=clean(testimony_of(folder, facts)))


def _machine(runs_dir: Path) -> dict[str, Any]:
    """What it has, in bytes."""
    there = next(path for path in (runs_dir.resolve(), *runs_dir.resolve().parents) if path.exists())
    disk = shutil.disk_usage(there)
    memory = {key: os.sysconf(key) * os.sysconf("SC_PAGE_SIZE") for key in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")}
    return {
        "kind": "Machine",
        "metadata": {"name": os.uname().nodename},
        "cpus": os.cpu_count(),
        "memory": {"total": memory["SC_PHYS_PAGES"], "free": memory["SC_AVPHYS_PAGES"]},
        "disk": {"path": str(there), "total": disk.total, "free": disk.free},
    }
