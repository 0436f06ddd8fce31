"""What the steps since the last log took on this rank, and which rank takes longer than the others."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low
from typing import Any

import torch

from orchestrator.train.ledger import PhaseClock

OF_STEPS = ("compute", "data_wait", "communication_wait", "compile")


class Pace:
    """Takes the clock's seconds for each event and keeps those of steps until the next log."""

    def __init__(self, clock: PhaseClock, step: int):
        """`step`: steps of the run that are behind this attempt when it starts."""
        self._clock, self._logged = clock, step
        self._since: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last event."""
        phases = self._clock.take()
        for phase in OF_STEPS:
            self._since[phase] = self._since.get(phase, 0.0) + phases.get(phase, 0.0)
        return phases

    def own_step_s(self, step: int) -> float:
        """Seconds that this rank's own computing took per step since the last log."""
        return self._since.get("compute", 0.0) / max(1, step - self._logged)

    def log(self, step: int, images: float) -> dict[str, Any]:
        """Figures of the steps since the last call; `images` of all ranks."""
        elapsed = max(sum(self._since.values()), 1e-9)
        facts = {
            "train/images_per_s": images / elapsed,
            "data_wait_fraction": self._since.get("data_wait", 0.0) / elapsed,
            "communication_wait_fraction": self._since.get("communication_wait", 0.0) / elapsed,
        }
        self._since, self._logged = {}, step
        return facts


def at_own_place(value: float, rank: int, world_size: int) -> torch.Tensor:
    """(W,) float64, zero but at this rank's place: the sum over the ranks holds the value of each."""
    places = torch.zeros(world_size, dtype=torch.float64)
    places[rank] = value
    return places


def slowest(step_s: Sequence[float]) -> dict[str, Any]:
    """The rank whose steps take longest, against the lower median of all; nothing where there is nobody to compare."""
    middle = median_low(step_s) if len(step_s) > 1 else 0.0
    if middle <= 0:
        return {}
    rank = max(range(len(step_s)), key=step_s.__getitem__)
    return {"ranks/slowest": rank, "ranks/slowest_ratio": round(step_s[rank] / middle, 4)}
