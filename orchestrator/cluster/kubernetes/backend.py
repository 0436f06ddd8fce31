"""Runs on Kubernetes: the objects of a namespace are the state, the logs of pods and the run's folder the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.cluster.backend import LogLine
from orchestrator.cluster.kubernetes.api import Api, Object, connect
from orchestrator.cluster.kubernetes.asking import ask_for_stacks
from orchestrator.cluster.kubernetes.avoiding import avoid, is_warned, nodes_to_avoid
from orchestrator.cluster.kubernetes.facts import facts_of, newest_progress, place_of
from orchestrator.cluster.kubernetes.follow import Follower
from orchestrator.cluster.kubernetes.lifecycle import collect_code, erase, objects_of, start_again, suspend
from orchestrator.cluster.kubernetes.logs import Joiner, read_ended, with_earlier
from orchestrator.cluster.kubernetes.packing import packs
from orchestrator.cluster.kubernetes.pods import has_started, is_running
from orchestrator.cluster.kubernetes.pull import earlier_lines, pull_folder, stored_facts
from orchestrator.cluster.kubernetes.render import START_DEADLINE
from orchestrator.cluster.kubernetes.resources import RUN, run_of
from orchestrator.cluster.kubernetes.runs import Found, all_runs, get_run, observe, pods_of
from orchestrator.cluster.kubernetes.states import Observed, RunState, is_suspended, queue_of, state_of
from orchestrator.cluster.kubernetes.submit import create
from orchestrator.cluster.kubernetes.survey import survey
from orchestrator.cluster.snapshot import Snapshot
from orchestrator.cluster_config import ClusterConfig
from orchestrator.errors import UserError

logger = logging.getLogger(__name__)


def open_backend(config: ClusterConfig, runs_dir: Path) -> KubernetesBackend:
    """The backend of the cluster that the config names; where the runs' folders are, their bundles say."""
    return KubernetesBackend(connect(config.context, config.namespace))


class KubernetesBackend:
    """Implements `cluster.backend.Backend`."""

    def __init__(self, api: Api):
        self._api = api

    def ids(self) -> list[str]:
        return [run_of(run) for run in all_runs(self._api)]

    def runs(self) -> list[dict[str, Any]]:
        """By the runs' own objects alone: one call for each kind, however many there are."""
        runs = all_runs(self._api)
        return [facts_of(run, state_of(Observed(run, looked=False)), {}) for run in runs]

    def status(self, run_id: str) -> dict[str, Any]:
        found = get_run(self._api, run_id)
        seen, state = self._look(found)
        progress = newest_progress(self._api, seen.pods)
        if not packs(found.run) and (not state.living or not progress):
            progress = stored_facts(self._api, found) or progress
        facts = facts_of(found.run, state, progress)
        return {**facts, "folder": progress.get("folder"), "where": place_of(self._api, found, seen)}

    def logs(self, run_id: str, follow: bool, rank: int | None) -> Iterator[LogLine]:
        found = get_run(self._api, run_id)
        living = state_of(observe(self._api, found)).living

        def earlier(before: int | None) -> Iterator[LogLine]:
            is_new = before is None and living  # no pod has said anything yet
            return iter(()) if is_new or packs(found.run) else earlier_lines(self._api, found, before, rank)

        return with_earlier(self._pods_lines(run_id, follow, Joiner(rank)), earlier)

    def _pods_lines(self, run_id: str, follow: bool, joiner: Joiner) -> Iterator[LogLine]:
        if not follow:
            return read_ended(self._api, pods_of(self._api, run_id), joiner)
        follower = Follower(self._api, f"{RUN}={run_id}", joiner)
        return follower.lines(lambda: not self._look(get_run(self._api, run_id))[1].living)

    def cancel(self, run_id: str, now: bool) -> None:
        found = get_run(self._api, run_id)
        state = state_of(observe(self._api, found))
        if state.state in ("done", "failed"):
            raise UserError(f"run {run_id} has ended: {state.state}. Way out: orchestrator status {run_id}")
        suspend(self._api, found, now)

    def resume(self, run_id: str) -> int | None:
        found = get_run(self._api, run_id)
        seen = observe(self._api, found)
        state = state_of(seen)
        if state.living or state.state == "done":
            raise UserError(f"run {run_id} is {state.state}. Way out: orchestrator status {run_id}")
        if is_suspended(seen) and is_warned(found.run, seen.pods):
            start_again(self._api, found)
            return None
        objects = objects_of(self._api, found)
        unfit = nodes_to_avoid(objects, seen.pods)
        if unfit:
            avoid(objects, unfit)
            logger.warning("run %s avoids %s, which a launcher found unfit", run_id, ", ".join(unfit))
        objects[-1]["spec"]["suspend"] = queue_of(found.run) is not None
        create(self._api, objects, found)
        return None

    def pull(self, run_id: str, to: Path, checkpoints: bool = False) -> Path:
        """Checkpoints may be a hundred times the rest, and a log is a narrow way: they come if asked for."""
        return pull_folder(self._api, self._training(run_id), to, checkpoints)

    def stacks(self, run_id: str) -> dict[int, str]:
        self._training(run_id)
        pods = [pod for pod in pods_of(self._api, run_id) if is_running(pod) and has_started(pod)]
        return ask_for_stacks(self._api, pods) if pods else {}

    def snapshot(self, run_id: str | None) -> Snapshot:
        return survey(self._api, run_id)

    def remove(self, run_id: str) -> None:
        found = get_run(self._api, run_id)
        state = state_of(observe(self._api, found))
        if state.living:
            raise UserError(f"run {run_id} is {state.state}. Way out: orchestrator cancel {run_id}, then rm")
        erase(self._api, found)
        collect_code(self._api, found)

    def _training(self, run_id: str) -> Found:
        """Raises UserError for a job that has neither a folder nor ranks."""
        found = get_run(self._api, run_id)
        if packs(found.run):
            raise UserError(f"ID {run_id} packs shards, which lie on their claim. Way out: orchestrator logs {run_id}")
        return found

    def _look(self, found: Found) -> tuple[Observed, RunState]:
        """Where the run stands now. Whoever looks ends a run that did not start in time: nothing in a cluster does."""
        seen = observe(self._api, found)
        state = state_of(seen)
        if is_overdue(seen, state, datetime.now(UTC)):
            logger.warning("run %s did not start within cluster.start_deadline_s: %s", found.name, state.reason)
            suspend(self._api, found, now=True)
            reason = f"did not start within cluster.start_deadline_s: {state.reason or 'no reason was told'}"
            return seen, replace(state, state="stopped", reason=reason, nodes=())
        return seen, state


def is_overdue(seen: Observed, state: RunState, now: datetime) -> bool:
    """Whether a run that has never started had more than its time. Pure."""
    limit = (seen.run["metadata"].get("annotations") or {}).get(START_DEADLINE)
    if not limit or state.state != "starting" or state.restarts or any(map(has_started, seen.pods)):
        return False
    return (now - started_at(seen.run)).total_seconds() > float(limit)


def started_at(run: Object) -> datetime:
    """When a run was last let go: by its queue, by `resume`, or by its creation."""
    status = run.get("status") or {}
    let_go = [one.get("lastTransitionTime") for one in status.get("conditions") or []
              if one["type"] == "Suspended" and one["status"] == "False"]  # fmt: skip
    told = [run["metadata"]["creationTimestamp"], status.get("startTime"), *let_go]
    return max(datetime.fromisoformat(one) for one in told if one)
