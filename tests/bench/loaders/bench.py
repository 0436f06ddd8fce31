"""All loaders in turns, round after round, so that the machine's drift meets them alike; medians and ratios to ours."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.bench.loaders import peers, sets
from tests.bench.loaders.catalogue import LIMIT, LOADERS, REFERENCE
from tests.bench.loaders.process import run_and_end

OUT = sets.ROOT / "bench" / "out" / "loaders.json"
ROUNDS = int(os.environ.get("LOADERS_ROUNDS", "5"))
BATCHES = int(os.environ.get("LOADERS_BATCHES", "22"))
OTHERS = [name for name in os.environ.get("LOADERS_OTHERS", "resume,remote").split(",") if name]
WARM_UP = 8
WORKERS = (1, 2)
LONGEST_S = 300
OTHER_S = 1800
ALONE = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}

Key = tuple[str, int]
"""Loader and number of workers."""


def bench() -> dict[str, Any]:
    """Images per processor second and per second of every loader on this machine, its memory and its first batch."""
    absent = {"peers": peers.install(), "sets": {}, "loaders": {}}
    results: dict[str, Any] = {"machine": machine(), "rounds": ROUNDS, "images": BATCHES * 128, "absent": absent}
    for name, reason in sets.available().items():
        if reason:
            absent["sets"][name] = reason
            print(f"  SKIPPED: set {name}: {reason}", flush=True)
            continue
        data = sets.make(name)
        results[name], absent["loaders"][name] = _measure(data, _prepare(data))
        for other in OTHERS:
            results[name][other] = _other(other, data)
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(json.dumps(results, indent=2) + "\n")
    return {"file": str(OUT.relative_to(sets.ROOT)), **{name: _speeds(results[name]) for name in _measured(results)}}


def _measured(results: dict[str, Any]) -> list[str]:
    return [name for name in sets.available() if name in results]


def _speeds(result: dict[str, Any]) -> dict[str, float]:
    return {name: one["1"]["images_per_cpu_s"] for name, one in result["loaders"].items() if "1" in one}


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    versions = {line.partition("==")[0]: line.partition("==")[2] for line in peers.PINS.read_text().splitlines()}
    shown = ("litdata", "mosaicml-streaming", "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "tensorflow-cpu")
    from importlib.metadata import version

    ours = {name: version(name) for name in ("torch", "torchvision", "webdataset", "pillow")}
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],
        "versions": ours | {name: versions[name] for name in shown},
    }


def _prepare(data: Path) -> dict[str, str]:
    """Make what the peers read; returns loader -> why it cannot take part."""
    absent = {}
    for name, loader in LOADERS.items():
        if name == LIMIT:
            try:
                importlib.import_module("tests.bench.loaders.limit").build(data)
            except RuntimeError as error:
                absent[name] = str(error)
        elif loader.data not in sets.SHARDS and not (data / f".{loader.data}").exists():
            done = _start(name, data, 1, "--convert")
            if done.returncode:
                absent[name] = f"cannot convert: {_last_line(done.stderr)}"
            else:
                (data / f".{loader.data}").touch()
    return absent


def _measure(data: Path, absent: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    runs: dict[Key, list[dict[str, float]]] = {}
    for number in range(ROUNDS):
        for workers in WORKERS:
            for name in LOADERS:
                if name in absent:
                    continue
                try:
                    done = _start(name, data, workers, "--batches", BATCHES, "--warm-up", WARM_UP)
                except subprocess.TimeoutExpired:
                    absent[name] = f"took longer than {LONGEST_S} s"
                    continue
                if done.returncode:
                    absent[name] = _last_line(done.stderr)
                    print(f"  {data.name}: {name} left out: {absent[name]}", flush=True)
                    continue
                runs.setdefault((name, workers), []).append(json.loads(done.stdout.splitlines()[-1]))
        print(f"  {data.name}: round {number + 1} of {ROUNDS}", flush=True)
    return {"loaders": summarise(runs)}, absent


def summarise(runs: dict[Key, list[dict[str, float]]]) -> dict[str, Any]:
    """Loader -> workers -> medians over the rounds, and the median of the ratios to ours of the same round."""
    found: dict[str, Any] = {}
    for (name, workers), rounds in runs.items():
        reference = runs.get((REFERENCE, workers), [])
        speeds = [one["images"] / one["cpu_s"] for one in rounds]
        pairs = zip(speeds, (one["images"] / one["cpu_s"] for one in reference), strict=False)
        ratios = [speed / ours for speed, ours in pairs]
        found.setdefault(name, {})[str(workers)] = {
            "images_per_cpu_s": round(statistics.median(speeds), 1),
            "images_per_cpu_s_range": [round(min(speeds), 1), round(max(speeds), 1)],
            "images_per_s": round(statistics.median(one["images"] / one["wall_s"] for one in rounds), 1),
            "ratio": round(statistics.median(ratios), 3) if ratios else None,
            "first_batch_s": round(statistics.median(one["first_batch_s"] for one in rounds), 2),
            "memory_mib_per_worker": round(statistics.median(one["memory_mib_per_worker"] for one in rounds)),
            "rounds": len(rounds),
        }
    return found


def _start(name: str, data: Path, workers: int, *options: object) -> subprocess.CompletedProcess[str]:
    python = sys.executable if LOADERS[name].is_ours or name == LIMIT else str(peers.PYTHON)
    command = [python, "-m", "tests.bench.loaders.run", name, "--data", str(data), "--workers", str(workers)]
    return run_and_end([*command, *map(str, options)], sets.ROOT, LONGEST_S, ALONE | LOADERS[name].environment)


def _other(module: str, data: Path) -> Any:
    """A measurement of a module of its own; `resume` runs in the peers' environment, which sees ours."""
    python = str(peers.PYTHON) if module == "resume" else sys.executable
    command = [python, "-m", f"tests.bench.loaders.{module}", str(data)]
    try:
        done = run_and_end(command, sets.ROOT, OTHER_S, ALONE)
    except subprocess.TimeoutExpired:
        print(f"  {data.name}: {module} left out: took longer than {OTHER_S} s", flush=True)
        return {"absent": f"took longer than {OTHER_S} s"}
    if done.returncode:
        print(f"  {data.name}: {module} left out: {_last_line(done.stderr)}", flush=True)
        return {"absent": _last_line(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def _last_line(text: str) -> str:
    lines: Iterable[str] = (line.strip() for line in reversed(text.splitlines()))
    return next((line for line in lines if "Error" in line or "error" in line), text.strip()[-200:])[:300]
