"""The grid of faults: 13 kinds, on rank 0 or 1, in one of four phases; and what the contract says of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from harness import Strike

KINDS = (
    "exception", "sys.exit", "SIGTERM", "SIGINT", "SIGKILL", "SIGSEGV", "abort", "SIGSTOP", "GIL lock", "loader hang",
    "loader SIGKILL", "torn checkpoint", "disk full",
)  # fmt: skip
PHASES = ("start", "step", "validation", "save")
HANGS = ("SIGSTOP", "GIL lock", "loader hang")
STEP, EVALUATED, SAVED = 17, 30, 21
"""Committed steps: between two saves; at the end of the first epoch; amid it."""
STOPS = {"SIGTERM": 143, "SIGINT": 130}
"""Faults after which the run ends in order, and goes on when it is started again."""
SENSELESS = {("disk full", phase): "nothing is saved in this phase" for phase in PHASES[:3]}

FOUR = {("SIGKILL", 1, "step"), ("SIGTERM", 0, "validation"), ("exception", 1, "save"), ("SIGSTOP", 0, "step")}
"""In the default suite."""
TWELVE = FOUR | {
    ("sys.exit", 1, "start"), ("SIGINT", 0, "save"), ("SIGSEGV", 0, "validation"), ("GIL lock", 1, "save"),
    ("loader hang", 1, "validation"), ("loader SIGKILL", 0, "step"), ("torn checkpoint", 1, "start"),
    ("disk full", 0, "save"),
}  # fmt: skip
"""In every change's check."""


@dataclass(frozen=True)
class Cell:
    """One fault at one place."""

    kind: str
    rank: int
    phase: str

    @property
    def name(self) -> str:
        return f"{self.kind}-rank{self.rank}-{self.phase}".replace(" ", "-")

    @property
    def key(self) -> tuple[str, int, str]:
        return self.kind, self.rank, self.phase

    @property
    def codes(self) -> tuple[int, ...]:
        """Exit codes of the command, typed until it ends well."""
        return (STOPS[self.kind], 0) if self.kind in STOPS else (0,)

    @property
    def attempts(self) -> int:
        return len(self.strikes()) + 1

    def strikes(self) -> tuple[Strike, ...]:
        if self.kind == "torn checkpoint" and self.phase == "start":
            # There is something to tear only after an attempt that saved.
            return Strike("SIGKILL", self.rank, "step", STEP, 1), Strike(self.kind, self.rank, "start", 0, 2)
        if self.kind.startswith("loader") and self.phase != "save":
            loader = "eval loader" if self.phase == "validation" else "train loader"
            return (Strike(self.kind, self.rank, loader, STEP if self.phase == "step" else 0),)
        if self.kind == "disk full" and self.rank:
            return (Strike(self.kind, self.rank, "save event", SAVED),)
        step = {"start": 0, "step": STEP, "validation": EVALUATED, "save": SAVED}[self.phase]
        return (Strike(self.kind, self.rank, self.phase, step),)


def cells() -> Iterator[Cell]:
    for kind, phase, rank in product(KINDS, PHASES, (0, 1)):
        if (kind, phase) not in SENSELESS:
            yield Cell(kind, rank, phase)
