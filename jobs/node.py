"""The launcher of one node of a run on several: what each pod starts, once in its life.

python -m jobs.node /etc/orchestrator/run/run.json
NODE_RANK=0 NUM_NODES=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python -m jobs.node RUN.json     # the same by hand
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from orchestrator.cluster.stops import StopSignals, end_deaf
from orchestrator.errors import UserError


def main(path: str, began: float) -> int:
    """Listens before it imports anything: a container's first process never hears of a signal that came too early."""
    stop = StopSignals()
    stop.listen()
    from jobs.train import rank
    from orchestrator.cluster.environment import read_node
    from orchestrator.cluster.node import run_node

    try:
        node = read_node()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    code = run_node(node, Path(path), rank, sys.stdout.buffer, stop, began)
    end_deaf()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], time.time()))
