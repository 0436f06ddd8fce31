"""The pod that packs shards: as any pod of ours, and what it prints last is what its status says."""

from __future__ import annotations

from typing import Any

from orchestrator.cluster.job import PACKS, JobSpec
from orchestrator.cluster.kubernetes.pod import COMPONENT, Part, pod


def packer(spec: JobSpec) -> dict[str, Any]:
    """No launcher writes last words there, so the end of the log of a failed one stands for them."""
    made = pod(spec, Part(PACKS, PACKS, spec.command, (), spec.resources))
    made["spec"]["containers"][0]["terminationMessagePolicy"] = "FallbackToLogsOnError"
    return made


def packs(run: dict[str, Any]) -> bool:
    """Whether a run's own object is no training."""
    return (run["metadata"].get("labels") or {}).get(COMPONENT) == PACKS
