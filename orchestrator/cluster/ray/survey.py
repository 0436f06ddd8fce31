"""A snapshot of a Ray cluster: the jobs of one run, the nodes, and what the run's log or folder tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.cluster.kubernetes.trimmed import clean
from orchestrator.cluster.lines import read_lines
from orchestrator.cluster.ray.api import Dashboard, RequestRefused
from orchestrator.cluster.ray.backend import shared_folder
from orchestrator.cluster.ray.facts import facts_of
from orchestrator.cluster.ray.submit import jobs_of
from orchestrator.cluster.snapshot import Snapshot, now
from orchestrator.cluster.testimony import LINES, testimony_of
from orchestrator.errors import TransientError

JOB = (
    "submission_id",
    "status",
    "message",
    "error_type",
    "start_time",
    "end_time",
    "driver_exit_code",
    "driver_node_id",
)
NODE = ("node_id", "node_name", "node_ip", "state", "state_message", "is_head_node", "resources_total", "labels")
NODES = 10_000
Job = dict[str, Any]


def survey(dashboard: Dashboard, run_id: str | None = None) -> Snapshot:
    """Reads the run's folder as well where this machine has it."""
    taken, record, missing = now(), dict[str, Any](), dict[str, str]()
    objects: dict[str, list[dict[str, Any]]] = {}
    jobs = jobs_of(dashboard, run_id) if run_id else []
    if jobs:
        record = clean(_record(dashboard, jobs, shared_folder(jobs)))
    objects["RayJobSubmission"] = [clean({key: job.get(key) for key in JOB}) for job in jobs]
    try:
        objects["RayNode"] = _nodes(dashboard)
    except (RequestRefused, TransientError, KeyError, TypeError, ValueError) as error:
        missing["RayNode"] = f"the dashboard does not tell of its nodes ({error})"
    return Snapshot(taken, "ray", dashboard.address, "", run_id, objects, missing, {}, record)


def _record(dashboard: Dashboard, jobs: list[Job], folder: Path | None) -> dict[str, Any]:
    log = dashboard.logs(str(jobs[-1]["submission_id"]))
    facts = facts_of(jobs, folder, log)
    if folder is not None:
        told = testimony_of(folder, facts)
        return {**told, "lines": [*told["lines"], _driver(log)]}
    groups: dict[tuple[int, int | None], list[str]] = {}
    for said in read_lines(log.split("\n")):
        if said.kind == "log" and said.rank is not None:
            groups.setdefault((said.attempt, said.rank), []).append(said.text)
    newest = max((attempt for attempt, _ in groups), default=0)
    ranks = [{"attempt": newest, "rank": rank, "lines": lines[-LINES:]} for (attempt, rank), lines in groups.items()
             if attempt == newest]  # fmt: skip
    end = {"exit_code": facts.get("exit_code"), "error": facts.get("error")}
    return {"facts": facts, "end": end, "lines": [*ranks, _driver(log)]}


def _driver(log: str) -> dict[str, Any]:
    """What the driver itself says, and what Ray prints around it."""
    return {"attempt": 0, "rank": None, "lines": log.splitlines()[-LINES:]}


def _nodes(dashboard: Dashboard) -> list[dict[str, Any]]:
    answer = json.loads(dashboard.send("GET", f"/api/v0/nodes?limit={NODES}&detail=1"))
    found = answer["data"]["result"]["result"]
    return [{key: one.get(key) for key in NODE} for one in found]
