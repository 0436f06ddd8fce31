"""Seconds from a command to the end of the first step, wherever the run goes, beside what one writes by hand there.

`python -m tests.bench.first_step [local] [ray_warm] [ray_cold] [kubernetes]`: alternating pairs, medians. The last one
asks the cluster of KUBECONFIG (`tests/kube` says which) and needs the digits on its claim, which it puts there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kube"))

from ray_nodes import RayCluster, environment, one_node

from tests.bench.__main__ import BIN, digits, paired, run

RAW = Path(__file__).with_name("raw_job.py")
QUICK = ("experiment=quickstart", "max_steps=1", "tracking=disabled")
FIRST = re.compile(r"first step (\d+\.\d+)")


def first_step(folder: Path) -> float:
    """When our run in a folder of runs ended its first step, by its own events."""
    (events,) = folder.glob("*/events/rank_0.jsonl")
    return next(e["t"] for e in map(json.loads, events.read_text().splitlines()) if e["kind"] == "step")


def said_first(text: str) -> float:
    found = FIRST.search(text)
    assert found is not None, text
    return float(found[1])


def local() -> dict[str, float]:
    """This machine, against torchrun."""
    shards = digits()

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            began = time.time()
            run(BIN / "orchestrator", "train", *QUICK, f"runs_dir={folder}")
            return first_step(Path(folder)) - began

    def theirs() -> float:
        began = time.time()
        raw = ("--standalone", "--nproc-per-node", "2", RAW, "torchrun", shards / "train")
        return said_first(run(BIN / "torchrun", *raw)) - began

    return paired(ours, theirs)


def ray_warm() -> dict[str, float]:
    """A Ray cluster that is there, against Ray Train submitted to the same one."""
    shards = digits()
    with one_node() as cluster:
        return paired(lambda: _ours_on_ray(cluster, shards), lambda: _theirs_on_ray(cluster, shards))


def ray_cold() -> dict[str, float]:
    """The same with the start of the cluster."""
    shards = digits()

    def with_start(measure: Callable[[RayCluster, Path], float]) -> float:
        began = time.time()
        with one_node() as cluster:
            up = time.time() - began
            return up + measure(cluster, shards)

    return paired(lambda: with_start(_ours_on_ray), lambda: with_start(_theirs_on_ray))


def _ours_on_ray(cluster: RayCluster, shards: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        more = (f"runs_dir={folder}", f"data_dir={shards.parent}", "--follow")
        run(BIN / "orchestrator", "train", *QUICK, *cluster.overrides, *more)
        return first_step(Path(folder)) - began


def _theirs_on_ray(cluster: RayCluster, shards: Path) -> float:
    env = environment(cluster)
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        script = (sys.executable, RAW, "ray", shards / "train", folder)
        words = [BIN / "ray", "job", "submit", "--address", cluster.address, "--", *script]
        done = subprocess.run(list(map(str, words)), env=env, capture_output=True, text=True, check=True)
        return said_first(done.stdout) - began


def kubernetes() -> dict[str, Any]:
    """Pods on two nodes, against a Job and a Service written by hand whose pods run torchrun."""
    from tests.bench.on_kubernetes import Rivals

    with Rivals.standing() as rivals:
        return paired(rivals.ours, rivals.theirs)


MEASURED = {one.__name__: one for one in (local, ray_warm, ray_cold, kubernetes)}


def main(names: list[str]) -> None:
    for name in names or MEASURED:
        print(json.dumps({name: MEASURED[name](), "load": round(os.getloadavg()[0], 1)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
