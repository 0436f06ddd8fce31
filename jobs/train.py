"""One rank of a training run.

orchestrator train experiment=quickstart                 # starts this program in every process
torchrun --nproc-per-node 2 -m jobs.train RUN.json       # the same by hand
torchrun --nproc-per-node 2 -m jobs.train experiment=quickstart compute.num_processes=2
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from orchestrator.bundle import load_bundle
from orchestrator.world import read_world


def rank(bundle_path: str, attempt: int, began: float) -> None:
    """What the launcher calls in each process; ends it with the contract's exit code."""
    # Here and not above: the launcher names this function without paying for what it needs.
    from orchestrator.train.fit import fit
    from orchestrator.train.process import supervise

    bundle, world = load_bundle(Path(bundle_path)), read_world()
    code = supervise(bundle.folder, world, attempt, lambda out: fit(bundle, world, attempt, began, out))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    from orchestrator.cluster.by_hand import run_by_hand

    sys.exit(run_by_hand(sys.argv[1:], rank, time.time()))
