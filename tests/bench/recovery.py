"""From a kill to the next attempt's first step, part by part, beside torchrun's restart of a plain script."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.train.heartbeat import heartbeat_file, read_sign
from tests.launching import wait_for

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
KILLS = 30
LONGEST_S = 300.0
STEPS_BETWEEN = 5
OPTIONS = (
    "data=digits", "model=cifar_resnet20", "recipe.epochs=1000", "recipe.global_batch_size=32", "compute=cpu2",
    "tracking.log_every_steps=1", "checkpointing=steps", "checkpointing.every_steps=1", "cluster.max_restarts=1000",
)  # fmt: skip
PARTS = ("detect", "teardown", "start", "first_batch", "first_step")
Event = dict[str, Any]


def bench(kills: int = KILLS, *more: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rows = _ours(Path(folder), kills, more)
    with tempfile.TemporaryDirectory() as folder:
        theirs = _torchrun(Path(folder), kills)
    ours = [sum(row.values()) for row in rows]
    return {
        "kills": len(rows),
        "total": spread(ours),
        "parts": {part: spread([row[part] for row in rows]) for part in PARTS},
        "torchrun": spread(theirs),
        "load": os.getloadavg()[0],
    }


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return {"p50": round(statistics.median(ordered), 3), "p95": round(p95, 3), "max": round(ordered[-1], 3)}


def _ours(folder: Path, kills: int, more: tuple[str, ...]) -> list[dict[str, float]]:
    command = [BIN / "orchestrator", "train", *OPTIONS, f"runs_dir={folder}", *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    chance, struck = random.Random(0), []
    run = _wait(lambda: next(folder.glob("*/events/rank_0.jsonl"), None)).parents[1]
    for attempt in range(1, kills + 1):
        _wait(lambda attempt=attempt: len(_steps(run, attempt)) >= STEPS_BETWEEN)
        sign = read_sign(heartbeat_file(run, attempt, chance.randrange(2)))
        assert sign is not None
        time.sleep(chance.random() * 0.2)
        struck.append(time.time())
        os.kill(sign.pid, signal.SIGKILL)
    _wait(lambda: len(_steps(run, kills + 1)) >= 1)
    (run / "stop").touch()
    process.wait()
    return [_split(run, attempt, t) for attempt, t in enumerate(struck, 1)]


def _split(run: Path, attempt: int, killed: float) -> dict[str, float]:
    """Seconds of each part between a kill in this attempt and the end of the next one's first step."""
    launcher, ranks = _events(run, "launcher"), _events(run, "rank_0")
    times = [
        killed,
        _time(launcher, attempt, "fault"),
        _time(launcher, attempt + 1, "restart"),
        _time(ranks, attempt + 1, "start"),
        _time(ranks, attempt + 1, "first_step"),
        _time(ranks, attempt + 1, "step"),
    ]
    return {part: later - earlier for part, earlier, later in zip(PARTS, times, times[1:], strict=False)}


def _time(events: list[Event], attempt: int, kind: str) -> float:
    return next(event["t"] for event in events if (event["attempt"], event["kind"]) == (attempt, kind))


def _steps(run: Path, attempt: int) -> list[Event]:
    return [event for event in _events(run, "rank_0") if (event["attempt"], event["kind"]) == (attempt, "step")]


def _events(run: Path, name: str) -> list[Event]:
    text = (run / "events" / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def _torchrun(folder: Path, kills: int) -> list[float]:
    """The same with a script that saves each step and torchrun --max-restarts; imports are part of each restart."""
    (folder / "steps").touch()
    command = [
        BIN / "torchrun", "--nproc-per-node", "2", "--standalone", "--max-restarts", str(kills + 1),
        "--monitor-interval", "0.05", "-m", "tests.bench.plain_restart", folder,
    ]  # fmt: skip
    # Else all attempts share a store, and each restart reads dead addresses: minutes each.
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return _strike(folder, kills)
    finally:
        process.terminate()
        process.wait()


def _strike(folder: Path, kills: int) -> list[float]:
    log, chance, seconds, killed = folder / "steps", random.Random(0), list[float](), 0.0
    for attempt in range(kills + 1):
        _wait(lambda attempt=attempt: len(_lines(log, attempt)) >= (STEPS_BETWEEN if attempt < kills else 1))
        if attempt:
            seconds.append(_lines(log, attempt)[0][1] - killed)
        if attempt < kills:
            pid = int((folder / f"pid_{chance.randrange(2)}").read_text())
            time.sleep(chance.random() * 0.2)
            killed = time.time()
            os.kill(pid, signal.SIGKILL)
    return seconds


def _lines(log: Path, attempt: int) -> list[tuple[int, float]]:
    rows = [line.split() for line in log.read_text().splitlines()]
    return [(int(row[0]), float(row[1])) for row in rows if len(row) == 2 and int(row[0]) == attempt]


def _wait(condition: Callable[[], Any]) -> Any:
    return wait_for(condition, "the run's next steps", LONGEST_S)
