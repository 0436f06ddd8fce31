"""All layers asked in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.cluster.forecast.admission import judge_rights, judge_security
from orchestrator.cluster.forecast.answer import Finding, Object, Surroundings, Verdict, worst
from orchestrator.cluster.forecast.demand import Share, groups_of, run_of
from orchestrator.cluster.forecast.presence import judge_presence
from orchestrator.cluster.forecast.queues import judge_queue
from orchestrator.cluster.forecast.quotas import judge_limits, judge_quotas
from orchestrator.cluster.forecast.room import judge_nodes


@dataclass(frozen=True, slots=True)
class Forecast:
    """What would become of a run that was sent now."""

    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        return worst(self.findings)

    def facts(self) -> dict[str, Any]:
        return {"verdict": self.verdict.name, "layers": [finding.facts() for finding in self.findings]}


def forecast(objects: Sequence[Object], around: Surroundings, share: Share) -> Forecast:
    """`objects`: as they would be sent, the run last. Pure: the same snapshot gives the same answer."""
    groups = groups_of(objects)
    return Forecast(
        (
            judge_rights(objects, around),
            judge_security(groups, around),
            *judge_presence(objects, groups, around),
            judge_limits(groups, around),
            judge_quotas(objects, groups, around),
            judge_queue(run_of(objects), groups, around),
            judge_nodes(groups, around, share),
        )
    )
