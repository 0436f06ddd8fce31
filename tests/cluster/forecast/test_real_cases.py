"""Snapshots of a real cluster with runs that it took, let wait or never started: the same answer without the cluster.

`KEEP_SNAPSHOTS=tests/cluster/forecast/cases pytest -m cluster tests/kube/test_forecast_live.py` takes them anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.cluster.forecast.demand import Share
from orchestrator.cluster.forecast.forecast import forecast
from orchestrator.cluster.snapshot import Snapshot

CASES = sorted((Path(__file__).parent / "cases").glob("*.json"))


def test_there_are_forty_of_them_of_every_verdict() -> None:
    assert len(CASES) >= 40
    assert {json.loads(path.read_text())["verdict"] for path in CASES} == {"fits", "waits", "never"}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_plan_of_a_snapshot_is_what_the_cluster_then_did(path: Path) -> None:
    case = json.loads(path.read_text())
    known = {key: value for key, value in case["snapshot"].items() if key not in ("schema", "kind")}
    found = forecast(case["objects"], Snapshot(**known), Share())
    said = [(one.layer, one.verdict.name) for one in found.findings]
    assert (case["layer"], case["verdict"]) in said
    assert found.verdict.name == case["verdict"], said
