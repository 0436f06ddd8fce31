"""What the canary's steps took, and how long the whole run will take by that."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.track.runs import read_events
from orchestrator.train.preflight import Sets, total_steps

OF_A_STEP = ("compute", "data_wait", "communication_wait")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the parts of a short run, as its first rank took them."""

    world_size: int
    steps: int
    start_s: float
    step_s: float
    """Median of the steps after the first."""
    data_wait: float
    """Share of these steps."""
    eval_s: float
    val_samples: int
    save_s: float
    """That a save held the steps up."""
    cpu_gib: float
    gpu_gib: float | None


def read_timing(folder: Path, steps: int) -> Timing:
    """From the events of the first rank."""
    events = read_events(folder / "events" / "rank_0.jsonl")
    of = {kind: [event for event in events if event["kind"] == kind] for kind in ("start", "step", "eval", "save")}
    taken = [[event["phases"].get(phase, 0.0) for phase in OF_A_STEP] for event in of["step"]]
    later = taken[1:] or taken
    first = next(event["t"] for event in events if event["kind"] == "first_step")
    start = of["start"][0]
    return Timing(
        world_size=start["world_size"],
        steps=steps,
        start_s=max(0.0, first - start["began"]),
        step_s=median(map(sum, later)),
        data_wait=sum(phases[1] for phases in later) / max(1e-9, sum(map(sum, later))),
        eval_s=of["eval"][-1]["seconds"],
        val_samples=of["eval"][-1]["val/acc1"]["count"],
        save_s=max((event["seconds"] for event in of["save"]), default=0.0),
        cpu_gib=max(event["cpu_gib"] for event in of["step"]),
        gpu_gib=max((event["gpu_gib"] for event in of["step"] if event["gpu_gib"]), default=None),
    )


def run_seconds(timing: Timing, config: RunConfig, sets: Sets) -> dict[str, float]:
    """Seconds that the whole run takes at this pace, by what they go to."""
    per_epoch = sets.plan(config).steps_per_epoch
    steps = total_steps(config, per_epoch)
    when, epochs = config.checkpointing, ceil(steps / per_epoch)
    saves = (epochs // when.every_epochs if when.every_epochs else 1) + (
        steps // when.every_steps if when.every_steps else 0
    )
    one_evaluation = timing.eval_s * sets.val.num_samples / max(1, timing.val_samples)
    return {
        "start": timing.start_s,
        "steps": steps * timing.step_s,
        "evaluation": epochs * one_evaluation,
        "checkpoints": saves * timing.save_s,
    }


def estimate_hours(timing: Timing, config: RunConfig, sets: Sets) -> str:
    """One sentence."""
    parts = run_seconds(timing, config, sets)
    whole = sum(parts.values())
    shares = ", ".join(f"{name} {_spell(seconds)}" for name, seconds in parts.items() if name != "start")
    return f"the whole run takes about {_spell(whole)} on {timing.world_size} such processes ({shares})"


def _spell(seconds: Any) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
