"""Hangs: who is late, by the ranks' own signs of life and a budget for each phase. Pure but for `read_signs`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config import ClusterConfig
from orchestrator.train.heartbeat import Sign, heartbeat_file, read_sign

BUDGET_KEYS = {
    "start": "hang_start_s",
    "step": "hang_step_s",
    "validation": "hang_validation_s",
    "save": "hang_save_s",
    "end": "hang_save_s",
}


@dataclass(frozen=True, slots=True)
class Late:
    """A rank that the others wait for."""

    rank: int
    phase: str
    step: int
    silent_s: float
    key: str
    """Of the budget that it has used up."""


def read_signs(folder: Path, attempt: int, ranks: Iterable[int], began: float) -> dict[int, Sign]:
    """Each rank's newest sign of life. `began`: time.monotonic() that stands for one that has given none yet."""
    none = Sign(0, "start", 0, began, 0)
    return {rank: read_sign(heartbeat_file(folder, attempt, rank)) or none for rank in ranks}


def steps_done(signs: Mapping[int, Sign]) -> int:
    return max((sign.step for sign in signs.values()), default=0)


def find_late(signs: Mapping[int, Sign], config: ClusterConfig, now: float | None = None) -> list[Late]:
    """The late ranks if the group hangs, the likeliest culprit first.

    All ranks beat at the same places, so the one with the fewest beats is where the others have been: it is judged
    by the budget of its own phase, and those that wait for it are not judged. Ranks that are level are judged once the
    last of them is late: the first to fall silent may be waiting for it.
    """
    now = time.monotonic() if now is None else now
    fewest = min(sign.beats for sign in signs.values())
    level = [
        Late(rank, sign.phase, sign.step, now - sign.t, BUDGET_KEYS[sign.phase])
        for rank, sign in signs.items()
        if sign.beats == fewest
    ]
    if any(found.silent_s <= getattr(config, found.key) for found in level):
        return []
    return sorted(level, key=lambda found: (-found.silent_s, found.rank))
