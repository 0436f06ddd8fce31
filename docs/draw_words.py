"""``python docs/draw_words.py`` writes the table of docs/why.md: what others say of runs broken on purpose.

The snapshots of tests/cluster/why/cases were taken of a real cluster; they hold the very words of its objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.cluster.kubernetes.pods import statuses
from orchestrator.cluster.snapshot import read_snapshot
from orchestrator.cluster.why.scene import RUNS
from orchestrator.cluster.why.verdict import explain

HERE = Path(__file__).parent
CASES = HERE.parent / "tests" / "cluster" / "why" / "cases"
PAGE = HERE / "why.md"
MARKS = ("<!-- words: python docs/draw_words.py -->\n", "<!-- end of words -->")
LONGEST = 220
STATES = {"queued": "PENDING", "starting": "PENDING", "running": "RUNNING", "failed": "FAILED", "stopped": "CANCELLED"}
"""What TorchX's scheduler for Kubernetes makes of the phase of a Volcano job."""
Object = dict[str, Any]


def page(text: str) -> str:
    """The page with its table written anew."""
    before, _, rest = text.partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}{table()}{mark}{after}"


def table() -> str:
    lines = [
        "| put into it | `kubectl describe` of the run | of its pods or Workload | state | `orchestrator why` |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(map(_cell, row(path)))} |" for path in sorted(CASES.glob("*.json"))),
    ]
    return "\n".join(lines) + "\n"


def row(path: Path) -> Iterator[str]:
    """What was done to the run, and what each tells of it."""
    snapshot = read_snapshot([path])
    objects, answer = snapshot.objects, explain(snapshot)
    run = answer.run_id
    case, _, cause = path.stem.partition(".")
    yield f"{cause.replace('none', 'nothing').replace('-', ' ')} (`{case}`)"
    yield _said(objects, RUNS, run) or "no word of a cause"
    yield _said(objects, ("Pod", "Workload", "RayCluster"), run) or "no word of a cause"
    yield STATES.get(answer.state, "RUNNING")
    yield answer.causes[0].said if answer.causes else f"nothing is wrong: {answer.said}"


def _said(objects: Mapping[str, Sequence[Object]], kinds: tuple[str, ...], run: str) -> str:
    """The wordiest warning of the objects of some kinds, as `kubectl describe` prints them; else a condition."""
    about = [event for event in objects.get("Event", []) if event["involvedObject"].get("kind") in kinds]
    warnings = [event for event in about if event["type"] == "Warning" and run in event["involvedObject"]["name"]]
    if warnings:
        told = max(warnings, key=lambda event: len(event["message"]))
        return f"{told['reason']}: {told['message']}"
    own = [obj for kind in kinds for obj in objects.get(kind, []) if run in obj["metadata"]["name"]]
    found = [text for obj in own for text in (*_waiting(obj), *_conditions(obj))]
    return found[0] if found else ""


def _waiting(pod: Object) -> Iterator[str]:
    for one in (*statuses(pod, "initContainerStatuses"), *statuses(pod)):
        state = one.get("state") or {}
        ended = state.get("terminated") or {}
        if state.get("waiting"):
            yield f"{state['waiting'].get('reason')}: {state['waiting'].get('message', '')}"
        if ended.get("exitCode"):
            yield f"{ended.get('reason')}: exit code {ended['exitCode']}"


def _conditions(obj: Object) -> Iterator[str]:
    for one in (obj.get("status") or {}).get("conditions") or ():
        bad = one["type"] in ("Failed", "Suspended", "Evicted", "Preempted", "Terminated")
        if one.get("message") and (
            bad if one["status"] == "True" else one["type"] in ("PodScheduled", "QuotaReserved")
        ):
            yield f"{one.get('reason')}: {one['message']}"


def _cell(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return flat if len(flat) <= LONGEST else f"{flat[:LONGEST].rsplit(' ', 1)[0]} ..."


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
