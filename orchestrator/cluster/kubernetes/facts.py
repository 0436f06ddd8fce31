"""What `status` and `ls` tell of a run: its state on the cluster, and the newest progress that its pods printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator.cluster.kubernetes.api import Api, Object
from orchestrator.cluster.kubernetes.pods import index_of, speaks
from orchestrator.cluster.kubernetes.resources import run_of
from orchestrator.cluster.kubernetes.runs import Found, tail_of
from orchestrator.cluster.kubernetes.states import Observed, RunState
from orchestrator.cluster.lines import parse

TAILS = (200, 5000)
"""Lines of a log in which the newest progress is looked for."""
FROM_PROGRESS = (
    "world_size", "step", "total_steps", "epoch", "eta_s", "images_per_s", "top1", "goodput", "wall_s", "process_hours",
    "cost", "currency", "checkpoint", "wandb",
)  # fmt: skip
"""Facts that only the run knows; None where it has not told."""
ONLY_LIVING = ("eta_s", "images_per_s")
ENDED = ("done", "failed", "stopped")


def facts_of(run: Object, state: RunState, progress: Mapping[str, Any]) -> dict[str, Any]:
    """As `track.status.status_of`, as far as a cluster knows. Pure."""
    told = {key: progress.get(key) for key in FROM_PROGRESS}
    if not state.living:
        told.update(dict.fromkeys(ONLY_LIVING))
    run_id = run_of(run)
    return {
        "run_id": run_id,
        "state": state.state,
        "kind": run["kind"],
        "exit_code": state.exit_code,
        "reason": _reason(state, progress),
        "attempt": max(state.attempt or 0, progress.get("attempt") or 0) or None,
        "restarts": state.restarts,
        "nodes": list(state.nodes),
        **told,
        "next": f"orchestrator resume {run_id}" if state.state in ("stopped", "failed") else None,
    }


def _reason(state: RunState, progress: Mapping[str, Any]) -> str | None:
    """With what the run itself said of its end, where the cluster says otherwise."""
    said = progress.get("state")
    if said in ENDED and state.state in ENDED and said != state.state:
        return "; ".join(filter(None, (state.reason, f"the run itself said that it is {said}")))
    return state.reason


def newest_progress(api: Api, pods: Sequence[Object]) -> dict[str, Any]:
    """Of the newest pod that speaks for the run and told any; empty where none has."""
    first = filter(speaks, pods)
    for pod in sorted(first, key=lambda pod: pod["metadata"]["creationTimestamp"], reverse=True):
        for lines in TAILS:
            found = last_progress(tail_of(api, pod, lines))
            if found:
                return found
    return {}


def last_progress(lines: Iterable[str]) -> dict[str, Any]:
    """Pure."""
    found: dict[str, Any] = {}
    for line in lines:
        said = parse(line) if " progress] " in line[:40] else None
        if said is not None and said.kind == "progress":
            found = said.facts
    return found


def place_of(api: Api, found: Found, seen: Observed) -> list[str]:
    """The objects that a run consists of, as a person would look for them."""
    pods = sorted(seen.pods, key=lambda pod: (index_of(pod), pod["metadata"]["creationTimestamp"]))
    shown = [f"Pod {pod['metadata']['name']} on {pod['spec'].get('nodeName') or 'no node'} ({pod['status']['phase']})"
             for pod in pods]  # fmt: skip
    return [f"{found.run['kind']} {found.name} in {api.namespace} of {api.context}", *shown]
