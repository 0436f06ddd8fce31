"""Takes a snapshot of the cluster that a config names, with one of its runs or without."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.cluster.backend import Backend
from orchestrator.cluster.kubernetes.trimmed import clean
from orchestrator.cluster.local_backend import facts_of
from orchestrator.cluster.snapshot import Snapshot, now
from orchestrator.cluster.testimony import testimony_of, told_lines
from orchestrator.cluster_config import ClusterConfig
from orchestrator.options import Where


def take(config: ClusterConfig | None, backend: Backend, place: Path | str, run_id: str | None) -> Snapshot:
    """`config`: None for this machine; `place`: the folder of runs, or their address in a store."""
    if isinstance(place, str) and (config is None or config.where is Where.local):
        return of_store(backend, place, run_id)
    if config is None or config.where is Where.local:
        return of_machine(Path(place), run_id)
    if config.where is Where.ray:
        from orchestrator.cluster.ray.api import connect
        from orchestrator.cluster.ray.survey import survey

        return survey(connect(config), run_id)
    from orchestrator.cluster.kubernetes.api import connect as connect_kubernetes
    from orchestrator.cluster.kubernetes.survey import survey as survey_kubernetes

    return survey_kubernetes(connect_kubernetes(config.context, config.namespace), run_id)


def of_machine(runs_dir: Path, run_id: str | None) -> Snapshot:
    """The folder of a run, and the machine that it lies on."""
    taken = Snapshot(now(), "local", str(runs_dir), run_id=run_id, objects={"Machine": [_machine(runs_dir)]})
    if run_id is None:
        return taken
    folder = runs_dir / run_id
    return replace(taken, record=clean(testimony_of(folder, facts_of(folder))))


def of_store(backend: Backend, place: str, run_id: str | None) -> Snapshot:
    """A run whose folder is in an object store, as its backend reads it."""
    taken = Snapshot(now(), "local", place, run_id=run_id)
    if run_id is None:
        return taken
    facts = backend.status(run_id)
    end = {"exit_code": facts.get("exit_code"), "error": facts.get("error")}
    return replace(
        taken, record=clean({"facts": facts, "end": end, "lines": told_lines(backend.logs(run_id, False, None))})
    )


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
