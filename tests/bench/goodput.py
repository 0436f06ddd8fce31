"""Goodput under kills: a simulation over measured costs, beside what theory expects, and cells of it for real.

`python -m tests.bench goodput` measures the costs in one undisturbed run and simulates the grid. A cell for real:
`python -m tests.bench.goodput MTBF_S SAVE_EVERY [SEED [EPOCHS]]` kills ranks of a real run at random and prints both.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from orchestrator.track.goodput import measure_run, recoveries
from orchestrator.track.runs import RunRecord, load_run
from orchestrator.track.timeline import read_timeline
from orchestrator.train.heartbeat import read_sign
from tests.track.histories import Costs, Simulation, exponential_kills

MTBF_S = (30.0, 60.0, 120.0)
SAVE_EVERY = (5, 20, 80)
SEEDS = 8
COSTS = ("launch_s", "step_s", "wait_s", "data_s", "save_s", "write_s", "eval_s", "import_s", "start_s")
FAILURES = 20
"""Kills that a simulated run goes through on average."""
ROOT = Path(__file__).parents[2]
ORCHESTRATOR = Path(sys.executable).with_name("orchestrator")
RUN = ("experiment=quickstart", "tracking=disabled", "cluster.max_restarts=1000000", "cluster.backoff_s=0",
       "checkpointing.every_epochs=0")  # fmt: skip


def costs_of(run: RunRecord) -> Costs:
    """The parts of a run's time as they were measured, for the simulation."""
    events = run.events
    told = [event for event in events if event["kind"] in ("step", "eval", "save")]
    steps = sum(_steps_of(told, event) for event in events if event["kind"] == "first_step")

    def per_step(phase: str) -> float:
        return sum(event["phases"].get(phase, 0.0) for event in told) / steps

    def per_event(kind: str, phase: str) -> float:
        return median([e["phases"].get(phase, 0.0) for e in events if e["kind"] == kind] or [0.0])

    import_s = per_event("start", "import")
    start_s = per_event("start", "start") + per_event("first_step", "start")
    return Costs(
        steps=steps, world_size=len(run.ranks), launch_s=_cold_s(run) - import_s - start_s,
        import_s=import_s, start_s=start_s,
        data_s=per_step("data_wait"), step_s=per_step("compute"), wait_s=per_step("communication_wait"),
        save_s=per_event("save", "checkpoint_stall"), write_s=_write_s(events), eval_s=per_event("eval", "evaluation"),
        eval_every=next(event["steps_per_epoch"] for event in events if event["kind"] == "start"),
        log_every=10, detect_s=0.05, pause_s=0.0,
    )  # fmt: skip


def _cold_s(run: RunRecord) -> float:
    """From the command to the first step: a first attempt has nobody who has imported torch for it."""
    began = next(event["began"] for event in run.launcher if event["kind"] == "launch")
    return next(event["t"] for event in run.events if event["kind"] == "first_step") - began


def _write_s(events: list[dict[str, Any]]) -> float:
    """Median time from the end of a save's stall until it was on the disk."""
    stalled = {(e["attempt"], e["step"]): e["t"] for e in events if e["kind"] == "save"}
    written = {(e["attempt"], e["step"]): e["t"] for e in events if e["kind"] == "saved"}
    return median([max(0.0, written[save] - stalled[save]) for save in stalled.keys() & written.keys()] or [0.0])


def _steps_of(told: list[dict[str, Any]], first: dict[str, Any]) -> int:
    """Steps that the attempt which began with `first` told of."""
    return max([e["step"] for e in told if e["attempt"] == first["attempt"]], default=first["step"]) - first["step"]


def simulate(costs: Costs, mtbf_s: float, save_every: int, seeds: int = SEEDS) -> float:
    """Mean goodput of runs whose attempts are killed after `mtbf_s` on average."""
    step_s = costs.step_s + costs.wait_s + costs.data_s
    longer = replace(costs, steps=max(4 * save_every, round(FAILURES * mtbf_s / step_s)), save_every=save_every)
    return mean(_goodput_of(Simulation(longer, exponential_kills(mtbf_s, seed)).play()) for seed in range(seeds))


def spread(costs: Costs, mtbf_s: float, save_every: int, seeds: int = 200) -> tuple[float, float]:
    """Between which two values nine of ten runs end that are as long as the measured one."""
    costs = replace(costs, save_every=save_every)
    found = sorted(_goodput_of(Simulation(costs, exponential_kills(mtbf_s, seed)).play()) for seed in range(seeds))
    return found[seeds // 20], found[-1 - seeds // 20]


def _goodput_of(played: Simulation) -> float:
    peers = {rank: events for rank, events in played.ranks.items() if rank}
    return measure_run(RunRecord(Path(), events=played.ranks[0], peers=peers, launcher=played.launcher)).value


def recovery_s(costs: Costs) -> float:
    return costs.detect_s + costs.pause_s + costs.import_s + costs.start_s


def ceiling(costs: Costs, mtbf_s: float) -> float:
    """1 - (recovery + save) / MTBF: what a run reaches that saves just before each kill and has no other overhead."""
    return 1 - (recovery_s(costs) + costs.save_s) / mtbf_s


def expected(costs: Costs, mtbf_s: float, save_every: int) -> float:
    """The same with what saves and evaluations cost in between and half an interval of lost steps a kill."""
    useful = costs.step_s + costs.wait_s
    interval_s = save_every * (useful + costs.data_s + costs.eval_s / costs.eval_every) + costs.save_s
    held = mtbf_s + costs.detect_s + costs.pause_s
    return save_every * useful / interval_s * (mtbf_s - costs.import_s - costs.start_s - interval_s / 2) / held


def bench() -> dict[str, Any]:
    """Costs of an undisturbed run, and the grid: simulated, expected, ceiling."""
    with tempfile.TemporaryDirectory() as folder:
        _train(Path(folder), "recipe.epochs=4", "checkpointing.every_steps=20")
        costs = costs_of(load_run(next(Path(folder).glob("runs/*"))))
    grid = {
        f"mtbf {mtbf:g} s, save every {every}": {
            "simulated": round(simulate(costs, mtbf, every), 3),
            "expected": round(expected(costs, mtbf, every), 3),
            "ceiling": round(ceiling(costs, mtbf), 3),
        }
        for mtbf in MTBF_S
        for every in SAVE_EVERY
    }
    return {"costs": {name: round(getattr(costs, name), 4) for name in COSTS}, "grid": grid}


def real_cell(mtbf_s: float, save_every: int, seed: int = 0, epochs: int = 60) -> dict[str, Any]:
    """A real run whose ranks are killed from outside, and what the simulation makes of its own costs."""
    with tempfile.TemporaryDirectory() as name:
        folder, luck = Path(name), random.Random(seed)
        more = (f"recipe.epochs={epochs}", f"checkpointing.every_steps={save_every}")
        process = subprocess.Popen([ORCHESTRATOR, "train", *RUN, *_data(), *more], cwd=folder)
        kills = 0
        while process.poll() is None:
            until = time.monotonic() + luck.expovariate(1 / mtbf_s)
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            kills += process.poll() is None and _kill_a_rank(folder, luck)
        run = load_run(next(folder.glob("runs/*")))
    came, costs = measure_run(run), costs_of(run)
    nine_of_ten = spread(replace(costs, steps=run.result["step"]), mtbf_s, save_every)
    times = sorted(f["recovery_s"] for f in recoveries(read_timeline(run.ranks, run.launcher)) if f["recovery_s"])
    return {
        "exit_code": process.returncode, "kills": kills, "real": round(came.value, 3),
        "simulated": round(simulate(costs, mtbf_s, save_every), 3),
        "nine_of_ten": [round(value, 3) for value in nine_of_ten],
        "expected": round(expected(costs, mtbf_s, save_every), 3), "ceiling": round(ceiling(costs, mtbf_s), 3),
        "recovery_p50_s": median(times) if times else None,
        "recovery_p95_s": times[int(0.95 * len(times))] if times else None,
        "seconds": {phase: round(seconds, 1) for phase, seconds in came.seconds.items()},
        "wall_s": round(came.wall_s, 1),
        "costs": {name: round(getattr(costs, name), 3) for name in COSTS},
    }  # fmt: skip


def _kill_a_rank(folder: Path, luck: random.Random) -> bool:
    """SIGKILL to a rank of the newest attempt, if one lives."""
    signs = sorted(folder.glob("runs/*/logs/attempt_*/rank_*.heartbeat"), key=lambda path: path.stat().st_mtime_ns)
    newest = [path for path in signs if path.parent == signs[-1].parent]
    sign = read_sign(luck.choice(newest)) if newest else None
    with suppress(ProcessLookupError):
        if sign is not None and sign.phase != "end":
            os.kill(sign.pid, signal.SIGKILL)
            return True
    return False


def _data() -> tuple[str, ...]:
    return (f"data_dir={ROOT / 'data'}",)


def _train(folder: Path, *more: str) -> None:
    subprocess.run([ORCHESTRATOR, "train", *RUN, *_data(), *more], cwd=folder, check=True, capture_output=True)


if __name__ == "__main__":
    print(json.dumps(real_cell(float(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:5])), indent=2))
