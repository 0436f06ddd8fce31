"""A training run on a Ray cluster: the driver, and each of its ranks.

python -m jobs.ray_driver run.json        # what `orchestrator train cluster=ray ...` sends as a job
ray job submit --working-dir FOLDER -- python -m jobs.ray_driver run.json       # the same by hand

The driver has a worker of Ray Train start this program again for each rank, with `--rank` and its facts; with
`--errand` it is a small job beside a run, with `--leave` the hook of a pod that is told to go.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO

from orchestrator.lineage import die_with_parent

RANK, ERRAND, LEAVE = "--rank", "--errand", "--leave"


def rank(run: str, attempt: int, began: float) -> int:
    """One rank in the environment that its worker set; returns its exit code."""
    from orchestrator.bundle import load_bundle, write_bundle
    from orchestrator.train.fit import fit
    from orchestrator.train.preflight import check_run
    from orchestrator.train.process import supervise
    from orchestrator.world import read_world

    bundle, world = load_bundle(Path(run)), read_world()

    def work(terminal: IO[str]) -> None:
        if world.is_first:  # here and not in the driver, which may have neither GPUs nor torch
            sets = check_run(bundle.config, world.world_size, world.local_world_size)
            write_bundle(bundle, bundle.folder / "run.json", sets.facts())
        fit(bundle, world, attempt, began, terminal)

    return supervise(bundle.folder, world, attempt, work)


def main(arguments: list[str]) -> int:
    if len(arguments) == 5 and arguments[0] == RANK:
        die_with_parent()
        run, attempt, began, parent = arguments[1:]
        return rank(run, int(attempt), float(began)) if os.getppid() == int(parent) else 1
    if len(arguments) == 3 and arguments[0] == ERRAND:
        from orchestrator.cluster.ray.errand import run_errand

        return run_errand(arguments[1], Path(arguments[2]))
    if len(arguments) == 2 and arguments[0] == LEAVE:
        from orchestrator.cluster.ray.leave import leave

        leave(arguments[1])
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("error: give one run.json. Way out: `orchestrator train cluster=ray ...` makes one", file=sys.stderr)
        return 42
    from orchestrator.cluster.ray.driver import drive

    return drive(arguments[0], [sys.executable, "-m", "jobs.ray_driver", RANK])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
