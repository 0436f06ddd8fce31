"""The table of exit codes in the words of each controller, as far as it has any."""

from __future__ import annotations

from typing import Any

from orchestrator.cluster.job import JobSpec
from orchestrator.errors import EXIT_NO_PROGRESS, EXIT_STOPPED, EXIT_TERMINATED, EXIT_USER

NEVER = (EXIT_USER, EXIT_NO_PROGRESS, EXIT_STOPPED)
"""Codes after which another attempt would change nothing."""
UNCOUNTED = (EXIT_TERMINATED,)
"""Codes of a run that was told to go, and saved."""


def job_rules() -> list[dict[str, Any]]:
    """`podFailurePolicy` of a Job that replaces pods: what no rule names counts towards backoffLimit."""
    return [_on_codes("FailJob", NEVER), _on_codes("Ignore", UNCOUNTED), _on_disruption("Ignore")]


def set_job_rules() -> list[dict[str, Any]]:
    """The same of a Job inside a JobSet: it fails at once, and its message says by which rule."""
    return [_on_codes("FailJob", NEVER), _on_codes("FailJob", UNCOUNTED), _on_disruption("FailJob")]


def set_rules() -> list[dict[str, Any]]:
    """`failurePolicy` of a JobSet over `set_job_rules`: what no rule names counts towards maxRestarts."""
    never, *uncounted = range(len(set_job_rules()))
    return [
        _on_message("never", "FailJobSet", [never]),
        _on_message("uncounted", "RestartJobSetAndIgnoreMaxRestarts", uncounted),
        {"name": "deadline", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]},
    ]


def backoff_limit(spec: JobSpec) -> int:
    """Each failure of a run is one of every pod: the survivors leave with 75 and are counted like the first."""
    return spec.max_restarts * spec.num_nodes


def _on_codes(action: str, codes: tuple[int, ...]) -> dict[str, Any]:
    """Of any container: the one that unpacks the code refuses with 42 as well."""
    return {"action": action, "onExitCodes": {"operator": "In", "values": sorted(codes)}}


def _on_disruption(action: str) -> dict[str, Any]:
    return {"action": action, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def _on_message(name: str, action: str, rules: list[int]) -> dict[str, Any]:
    patterns = [f"matching FailJob rule at index {rule}$" for rule in rules]
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": patterns,
    }
