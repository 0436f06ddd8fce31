"""Where a run stands, worked out from its record alone: for `orchestrator status`, whether it is running or not."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from orchestrator.track.goodput import count_work, measure, prices_of, recoveries, stragglers
from orchestrator.track.runs import Event, RunRecord, value
from orchestrator.track.timeline import AttemptSpan, read_timeline

RECENT = 5
"""Logged steps whose median speed stands for now."""


def status_of(run: RunRecord, launcher: int | None, now: float) -> dict[str, Any]:
    """`launcher`: the process that holds the run's lock, None where it is free; `now`: time.time()."""
    timeline = read_timeline(run.ranks, run.launcher, alive=launcher is not None)
    last = timeline.attempts[-1] if timeline.attempts else None
    cluster = run.config.get("cluster") or {}
    came = measure(timeline, prices_of(run))
    state, step = _state(run, launcher), _step(run, last)
    faults = recoveries(timeline)
    return {
        "run_id": run.run_id,
        "state": state,
        "launcher": launcher,
        "exit_code": run.result.get("exit_code") if state != "running" else None,
        "attempt": last.number if last else 0,
        "world_size": last.world_size if last else None,
        "step": step,
        **_progress(run, step, last, state == "running"),
        "images_per_s": _recent_speed(run.events),
        "top1": value((run.result.get("metrics") or {}).get("val/acc1")),
        "goodput": round(came.value, 4),
        "wall_s": round(came.wall_s, 3),
        "seconds": {phase: round(seconds, 3) for phase, seconds in came.seconds.items()},
        "process_hours": round(came.process_hours, 6),
        "cost": None if came.cost is None else round(came.total_cost or 0.0, 6),
        "currency": cluster.get("currency"),
        **_waste(run, timeline),
        "stragglers": [str(found) for found in stragglers(last)] if last else [],
        "faults": len(faults),
        "last_fault": faults[-1] if faults else None,
        "checkpoint": _checkpoint(run.events, now),
        "wandb": _mirror(run),
        "folder": str(run.folder),
        "next": _next(run, state),
    }


def _state(run: RunRecord, launcher: int | None) -> str:
    """`running` where somebody holds the lock; `dead` where the record says so and nobody does."""
    if launcher is not None:
        return "running"
    return "dead" if run.state in ("running", "starting", "new") else run.state


def _step(run: RunRecord, last: AttemptSpan | None) -> int:
    told = [e["step"] for e in (last.ranks.get(0, []) if last else []) if isinstance(e.get("step"), int)]
    return max(told, default=run.result.get("step") or 0)


def _progress(run: RunRecord, step: int, last: AttemptSpan | None, running: bool) -> dict[str, Any]:
    """Steps in all, epochs, and seconds to the end by the pace of this attempt, evaluation and saves included."""
    plan = plan_of(run)
    total, per_epoch = plan.get("total_steps"), plan.get("steps_per_epoch")
    own = last.ranks.get(0, []) if last else []
    first = next((e for e in own if e["kind"] == "first_step"), None)
    eta = None
    if running and first and total and own[-1].get("step", 0) > first["step"]:
        eta = round((own[-1]["t"] - first["t"]) / (own[-1]["step"] - first["step"]) * (total - step), 1)
    return {"total_steps": total, "epoch": round(step / per_epoch, 4) if per_epoch else None, "eta_s": eta}


def plan_of(run: RunRecord) -> Event:
    """The newest `start` event that tells the size of the run, or nothing."""
    return next((e for e in reversed(run.events) if e["kind"] == "start" and "total_steps" in e), {})


def _waste(run: RunRecord, timeline: Any) -> dict[str, Any]:
    plan = plan_of(run)
    if not plan:
        return {"wasted_steps": None, "wasted_samples": None}
    work = count_work(timeline, plan["num_samples"], plan["steps_per_epoch"])
    return {"wasted_steps": work.wasted_steps, "wasted_samples": work.wasted_samples}


def _recent_speed(events: list[Event]) -> float | None:
    speeds = sorted([e["train/images_per_s"] for e in events if e.get("train/images_per_s")][-RECENT:])
    return round(speeds[len(speeds) // 2], 1) if speeds else None


def _checkpoint(events: list[Event], now: float) -> dict[str, Any] | None:
    durable = {e["step"] for e in events if e["kind"] == "saved"}
    saved = next((e for e in reversed(events) if e["kind"] == "save" and e["step"] in durable), None)
    return saved and {"step": saved["step"], "path": saved.get("path"), "age_s": round(now - saved["t"], 1)}


def _mirror(run: RunRecord) -> str | None:
    """The address of the run's page where one is known, else the folder that `wandb sync` takes."""
    mode = (run.config.get("tracking") or {}).get("mode")
    if mode == "disabled":
        return None
    told: Mapping[str, Any] = next((e for e in reversed(run.events) if e["kind"] == "wandb"), {})
    folders = sorted((run.folder / "wandb").glob("*run-*"))
    return str(told["url"]) if told else str(folders[-1]) if folders else None


def _next(run: RunRecord, state: str) -> str | None:
    """What goes on with the run, typed in the folder where it was started."""
    if state in ("running", "done") or "overrides" not in run.bundle:
        return None
    return shlex.join(["orchestrator", "train", *map(str, run.bundle["overrides"])])
