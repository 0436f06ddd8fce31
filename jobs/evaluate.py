"""One rank of an evaluation.

orchestrator evaluate checkpoint=quickstart-1a2b3c4d:best
torchrun --nproc-per-node 3 -m jobs.evaluate runs/evaluate-5e6f7a8b/run.json     # again, by hand
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
    from orchestrator.train.evaluation_job import run_evaluation
    from orchestrator.train.heartbeat import Heartbeat, heartbeat_file
    from orchestrator.train.process import supervise

    bundle, world = load_bundle(Path(bundle_path)), read_world()
    heartbeat = Heartbeat(heartbeat_file(bundle.folder, attempt, world.rank))
    code = supervise(bundle.folder, world, attempt, lambda _: run_evaluation(bundle, world, began, heartbeat))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("error: give the run.json of an evaluation. Way out: `orchestrator evaluate` writes one", file=sys.stderr)
        sys.exit(42)
    rank(sys.argv[1], 1, time.time())
