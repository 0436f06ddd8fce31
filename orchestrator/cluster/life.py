"""One life of a node's launcher: what it was given, how far it came, and the record that it must leave."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.bundle import Bundle
from orchestrator.cluster import lifeline
from orchestrator.cluster.cause import Ended
from orchestrator.cluster.claim import RecordTaken
from orchestrator.cluster.environment import Node
from orchestrator.cluster.record_place import Record
from orchestrator.cluster.speaker import Speaker
from orchestrator.cluster.stops import StopSignals
from orchestrator.errors import EXIT_DONE, EXIT_TRANSIENT

KEEP_S = 60.0
"""What the end of a node waits for the store of the run's record."""
SPARE_S = 2.0
"""Of the time that a node has after a request to stop, for its own end."""


@dataclass(slots=True)
class Life:
    """One life of a node's launcher."""

    node: Node
    sent: Bundle
    """As it was submitted."""
    record: Record
    bundle: Bundle
    path: Path
    """Of the run.json that the ranks load."""
    entry: Callable[..., None]
    """What each rank calls, with the path, the attempt and the time."""
    speaker: Speaker
    stop: StopSignals
    began: float
    resolve: lifeline.Resolver = lifeline.resolve
    attempt: int = 0
    step: int = 0
    """The last one that was computed."""
    secured: bool = False
    """Whether the end of a run that is done is where the record is kept."""
    unkept: bool = False
    """Whether something of the record could not be brought there."""

    @property
    def folder(self) -> Path:
        return self.bundle.folder


def kept(life: Life, ended: Ended) -> Ended:
    """Have the record where it is kept; on the first node a run whose end is not there has not ended yet."""
    stop, now = life.stop, time.monotonic()
    limit_s = KEEP_S if stop.exit_code is None else stop.t + life.bundle.config.cluster.grace_s - SPARE_S - now
    try:
        why = life.record.flush(0.0 if life.unkept else max(0.0, limit_s))
    except RecordTaken as taken:
        return ended if ended.error else Ended(taken.exit_code, None, str(taken))
    done = ended.exit_code == EXIT_DONE and life.node.rank == 0
    if why is None:
        life.secured = life.secured or done
        return ended
    text = f"runs_dir = {life.sent.config.runs_dir}: the end of the record is on this node only ({why})"
    if done and not life.secured:
        life.unkept = True
        return Ended(EXIT_TRANSIENT, None, f"{text}. Way out: nothing, where the store comes back")
    if not life.unkept:
        life.speaker.say(f"warning: {text}")
    life.unkept = True
    return ended
