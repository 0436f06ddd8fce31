"""Steps of plain DDP, of DDP with the tree of virtual ranks, and without any exchange, taking turns.

torchrun --nproc-per-node W -m tests.bench.virtual_pairs MODEL OUT.json

Each process is one virtual rank, batches are made up. A shared machine drifts within a minute, so blocks of a few
steps alternate. The first rank writes the seconds of each round and what the tree sent.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from orchestrator.compose import compose
from orchestrator.model.zoo import build_model
from orchestrator.train.exchange import TreeExchange, tree_hook

BLOCK = 3
ROUNDS = 24
ROWS, SIDE, CLASSES = 16, 32, 10


class Steps:
    """A training loop with a way to exchange gradients."""

    def __init__(self, net: nn.Module, kind: str):
        self.model = DistributedDataParallel(net, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        self.exchange: TreeExchange | None = None
        self.exchanges = kind != "alone"
        if kind == "tree":
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self.exchange = TreeExchange(group, lambda parameters, gradients: None)
            self.model.register_comm_hook(self.exchange, tree_hook)

    def run(self, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Seconds of a block of steps."""
        dist.barrier()
        began = time.perf_counter()
        for _ in range(BLOCK):
            with nullcontext() if self.exchanges else self.model.no_sync():
                F.cross_entropy(self.model(batch[0]), batch[1]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        dist.barrier()
        return time.perf_counter() - began


def main(model: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = compose([f"model={model}"]).config
    loops = {kind: Steps(build_model(config.model, CLASSES), kind) for kind in ("plain", "tree", "alone")}
    torch.manual_seed(dist.get_rank())
    batch = torch.rand(ROWS, 3, SIDE, SIDE), torch.randint(0, CLASSES, (ROWS,))
    for loop in loops.values():
        loop.run(batch)
    exchange = loops["tree"].exchange
    assert exchange is not None
    sent, busy = exchange.bytes_sent, exchange.busy_s
    rounds = [{kind: loop.run(batch) / BLOCK for kind, loop in loops.items()} for _ in range(ROUNDS)]
    steps = ROUNDS * BLOCK
    if dist.get_rank() == 0:
        content = {
            "rounds": rounds,
            "sent": (exchange.bytes_sent - sent) / steps,
            "busy_s": (exchange.busy_s - busy) / steps,
            "bytes": 4 * sum(parameter.numel() for parameter in loops["tree"].model.parameters()),
        }
        Path(out).write_text(json.dumps(content))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
