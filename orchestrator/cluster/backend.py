"""What every kind of cluster answers about its runs; the verbs of the command line know no more than this."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from orchestrator.cluster.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line that a rank printed; `attempt`, `rank` and `number` tell it from every other one of the run."""

    attempt: int
    rank: int | None
    """None: the launcher of a node."""
    number: int
    """Of the line in the log of that rank and attempt, from 1."""
    text: str


class Backend(Protocol):
    """Runs of one cluster. Every method raises UserError for an id that the cluster does not know."""

    def ids(self) -> list[str]:
        """Of all runs, the one that was touched last at the end."""
        ...

    def runs(self) -> list[dict[str, Any]]:
        """Facts of each run, as of `track.status.status_of`; what is not known is None."""
        ...

    def status(self, run_id: str) -> dict[str, Any]:
        """The facts of one run, with `where`: the objects that it consists of."""
        ...

    def logs(self, run_id: str, follow: bool, rank: int | None) -> Iterator[LogLine]:
        """Lines of all ranks or of one, those of earlier attempts first; `follow` goes on until the run ends."""
        ...

    def cancel(self, run_id: str, now: bool) -> None:
        """Let the run save and stop; `now`: without saving."""
        ...

    def resume(self, run_id: str) -> int | None:
        """Go on with a run that was stopped; its exit code where this waits for its end, as on this machine."""
        ...

    def pull(self, run_id: str, to: Path, checkpoints: bool = False) -> Path:
        """Copy the run's folder to this machine, without its checkpoints unless asked; returns where it is."""
        ...

    def stacks(self, run_id: str) -> dict[int, str]:
        """The Python stack of every living rank."""
        ...

    def snapshot(self, run_id: str | None) -> Snapshot:
        """What the cluster and the run tell at this moment; None: of the cluster alone."""
        ...

    def remove(self, run_id: str) -> None:
        """Remove the cluster's objects of a run that has ended; its folder stays."""
        ...
