"""The answer of `why`: where a run stands, and its causes in order. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.cluster.kubernetes.pods import is_running
from orchestrator.cluster.snapshot import Snapshot
from orchestrator.cluster.why import creation, ends, meeting, placing, queues, starting, told, volumes
from orchestrator.cluster.why.cause import Cause, Depth, Stage, ranked
from orchestrator.cluster.why.scene import Scene, find_scene, of_event, of_object, seconds
from orchestrator.errors import EXIT_DONE, EXIT_TRANSIENT, EXIT_USER

FINDERS = (
    queues.causes, creation.causes, placing.causes, volumes.causes, starting.causes, meeting.causes, ends.causes,
    told.of_pods,
)  # fmt: skip
LATE_S = 300.0
"""After which a start that nobody explains is worth a question."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is wrong with a run, the first cause first; none where nothing is."""

    run_id: str
    state: str
    said: str
    """One sentence on where it stands."""
    causes: tuple[Cause, ...]
    earlier: tuple[Cause, ...]
    """What earlier attempts met, which holds nothing now."""
    unread: tuple[str, ...]
    """What could not be looked at."""

    @property
    def exit_code(self) -> int:
        """0: nothing is wrong; 75: it may pass by itself; 42: it needs somebody."""
        if not self.causes:
            return EXIT_DONE
        return EXIT_TRANSIENT if self.causes[0].passes else EXIT_USER

    def facts(self) -> dict[str, Any]:
        named = {"causes": self.causes, "earlier": self.earlier}
        lists = {key: [cause.facts() for cause in causes] for key, causes in named.items()}
        return {"schema": 1, "run_id": self.run_id, "state": self.state, "said": self.said, **lists,
                "unread": list(self.unread)}  # fmt: skip


def explain(snapshot: Snapshot, run_id: str | None = None) -> Answer:
    """Raises UserError for a run that the snapshot does not hold."""
    if snapshot.cluster != "kubernetes":
        return _of_record(snapshot)
    scene = find_scene(snapshot, run_id)
    causes = ranked(cause for finder in FINDERS for cause in finder(scene))
    if scene.state.state == "failed":
        causes = _of_an_end(causes)
    if all(cause.past for cause in causes):
        causes = ranked([*causes, *ends.verdict_of_controller(scene), *_silence(scene, causes)])
    state = scene.state.state
    return _answer(scene.name, state, _standing(scene), causes, _unread(snapshot))


def _of_an_end(causes: list[Cause]) -> list[Cause]:
    """Of a run that failed while it trained: what kept some of its pods away did not end it, and follows."""
    if not any(cause.stage is Stage.training and cause.depth is Depth.root and not cause.past for cause in causes):
        return causes
    return ranked(replace(one, depth=Depth.follows) if one.stage < Stage.meeting else one for one in causes)


def _of_record(snapshot: Snapshot) -> Answer:
    facts = snapshot.record.get("facts") or {}
    causes = ranked(told.of_record(snapshot))
    state = str(facts.get("state") or "unknown")
    said = told.progress(facts) or state
    return _answer(str(snapshot.run_id), state, said, causes, _unread(snapshot))


def _answer(run_id: str, state: str, said: str, causes: list[Cause], unread: tuple[str, ...]) -> Answer:
    named = [_named(cause, run_id) for cause in causes]
    now = tuple(cause for cause in named if not cause.past)
    return Answer(run_id, state, said, now, tuple(cause for cause in named if cause.past), unread)


def _named(cause: Cause, run_id: str) -> Cause:
    """With the run's id in the commands of its way out."""
    return replace(cause, way_out=cause.way_out.replace(" ID", f" {run_id}"))


def _standing(scene: Scene) -> str:
    state, facts = scene.state, scene.record.get("facts") or {}
    if state.state == "starting" and scene.finished and not scene.active:
        return "ending: its pods are done, and its controller has not said so yet"
    if state.state == "starting" or (state.state == "running" and not scene.settled):
        ready, many = len([pod for pod in scene.active if is_running(pod)]), max(scene.wanted, len(scene.active))
        return f"starting: {ready} of {many} pods run" if scene.active else "starting: it has no pod yet"
    if state.state == "stopped":
        return "stopped after saving: orchestrator resume goes on with it"
    return told.progress({**facts, "state": state.state}) or state.state


def _silence(scene: Scene, causes: list[Cause]) -> Iterator[Cause]:
    """A run that should have started long ago, of which nobody says anything."""
    if any(not cause.past for cause in causes) or scene.state.state != "starting" or scene.finished:
        return
    waited = scene.now - seconds(scene.run["metadata"].get("creationTimestamp") or "")
    if waited < LATE_S:
        return
    said = f"it has been starting for {waited:.0f} s, and nothing that could be read says why"
    last = tuple(map(of_event, scene.events[-2:])) or (of_object(scene.run, "status", scene.run.get("status") or {}),)
    way_out = "kubectl describe its pods; rights to read what is named below"
    yield Cause("unknown", said, way_out, Stage.start, last, Depth.own, passes=True)


def _unread(snapshot: Snapshot) -> tuple[str, ...]:
    return tuple(f"{kind}: {why}" for kind, why in sorted({**snapshot.missing, **snapshot.limits}.items()))
