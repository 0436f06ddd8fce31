"""Every cause has a name in the list that people read, and the list has no other."""

from __future__ import annotations

import ast
from pathlib import Path

from ended_runs import CASES as ENDED
from queued_runs import CASES as QUEUED
from scenes import healthy
from stuck_runs import CASES as STUCK
from unplaced_runs import CASES as UNPLACED

from orchestrator.cluster.why import catalogue
from orchestrator.cluster.why.verdict import explain

ROOM = Path(catalogue.__file__).parent


def test_every_cause_of_every_case_is_in_the_catalogue() -> None:
    for change, _, _ in (*QUEUED, *UNPLACED, *STUCK, *ENDED):
        world = healthy()
        change(world)
        found = explain(world.snapshot())
        assert {cause.name for cause in (*found.causes, *found.earlier)} <= catalogue.CATALOGUE.keys()


def test_the_catalogue_names_what_the_room_can_say() -> None:
    texts = [path.read_text() for path in ROOM.glob("*.py") if path.name != "catalogue.py"]
    written = {node.value for text in texts for node in ast.walk(ast.parse(text))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
    assert not catalogue.CATALOGUE.keys() - written
