"""What a tutorial on torchrun's restarts writes: plain DDP that saves each step and goes on from there."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from orchestrator.model.resnet import ResNetOptions, cifar_resnet


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, attempt = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    torch.set_num_threads(1)
    (folder / f"pid_{rank}").write_text(str(os.getpid()))
    net = DistributedDataParallel(cifar_resnet(20, 10, ResNetOptions()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    saved = folder / "saved.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
    while True:
        step(net, optimizer)
        if rank == 0:
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, saved.with_suffix(".tmp"))
            os.replace(saved.with_suffix(".tmp"), saved)
            with open(folder / "steps", "a") as file:
                file.write(f"{attempt} {time.time()}\n")


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
    optimizer.zero_grad()
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
