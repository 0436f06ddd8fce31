"""How many processes an attempt gets: the places of this machine, what an operator allows, what the run can use."""

from __future__ import annotations

import multiprocessing
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.config import ComputeConfig, process_range
from orchestrator.errors import ConfigError, NodeError
from orchestrator.options import Device
from orchestrator.train.orders import Request
from orchestrator.train.virtual import largest_world
from orchestrator.train.virtual_choice import slices_of


def num_processes(config: ComputeConfig) -> int:
    """The most processes that the config asks for on this machine."""
    if config.num_processes == "auto":
        return max(1, visible_gpus(config))
    reach = process_range(config.num_processes)
    assert reach is not None, "the config has been checked"
    return reach[1]


def visible_gpus(config: ComputeConfig) -> int:
    if config.device is Device.cpu:
        return 0
    import torch

    return torch.cuda.device_count()


@dataclass(slots=True)
class Places:
    """Where processes can run, over the attempts of one command."""

    config: ComputeConfig
    folder: Path
    lost: set[int] = field(default_factory=set)
    """Devices (or, on the CPU, processes) that a rank has reported unfit."""
    gpus: int = 0
    """As counted before the last start."""

    @property
    def reach(self) -> tuple[int, int]:
        """Least and most processes."""
        most = num_processes(self.config)
        return process_range(self.config.num_processes) or (most, most)

    @property
    def is_elastic(self) -> bool:
        low, high = self.reach
        return low < high

    @property
    def slices(self) -> int | None:
        """Of a step, as far as the run has chosen them: what the processes must share evenly."""
        return slices_of(self.config.virtual_ranks, self.folder)

    def count(self) -> int:
        """Places now: GPUs or processes, less the lost ones, at most what `<run>/places` says."""
        every = self.gpus or self.reach[1]
        return min(every - len(self.lost), allowed(self.folder / "places", every))

    def world_size(self) -> int:
        """Processes of the next attempt; the least where there is no place for it, which then says why it fails."""
        low, high = self.reach
        if not self.is_elastic:
            return high
        self.gpus = count_gpus(self.config)
        return largest_world(self.slices, low, high, self.count()) or low

    def lose(self, device: int) -> None:
        """Do without the place of a rank that reported its device unfit."""
        left = [number for number in range(self.reach[1] + len(self.lost)) if number not in self.lost]
        self.lost.add(left[device] if device < len(left) else device)

    def env(self) -> dict[str, str]:
        """Hide lost GPUs from the ranks."""
        if not self.lost or not visible_gpus(self.config):
            return {}
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = named.split(",") if named else [str(number) for number in range(self.gpus)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(n for number, n in enumerate(names) if number not in self.lost)}

    def ask(self, world_size: int, progressed: bool) -> Request:
        """What to ask of the running attempt: fewer processes at once, more of them at its next save."""
        if not self.is_elastic:
            return Request.none
        low, high = self.reach
        fits = largest_world(self.slices, low, high, min(self.count(), high))
        if 0 < fits < world_size:
            return Request.resize
        return Request.resize_at_save if fits > world_size and progressed else Request.none


def allowed(path: Path, otherwise: int) -> int:
    """The number in a file that an operator or a cluster's agent writes."""
    with suppress(OSError, ValueError):
        return max(0, int(path.read_text()))
    return otherwise


def count_gpus(config: ComputeConfig) -> int:
    """GPUs as a fresh process sees them; this one would not notice that one is gone."""
    if config.device is Device.cpu or not visible_gpus(config):
        return 0
    process = multiprocessing.get_context("forkserver").Process(target=_count_gpus)
    process.start()
    process.join()
    return process.exitcode or 0


def _count_gpus() -> None:
    import torch

    sys.exit(torch.cuda.device_count())


def processes_here(config: ComputeConfig, nodes: int) -> int:
    """Ranks of one node. Raises ConfigError where the nodes cannot have equally many."""
    total = num_processes(config)
    if config.num_processes == "auto":
        return total
    if total % nodes:
        rule = f"cannot be spread evenly over compute.num_nodes = {nodes}"
        raise ConfigError("compute.num_processes", config.num_processes, rule, f"compute.num_processes={nodes}")
    return total // nodes


def device_of(config: ComputeConfig, processes: int) -> str:
    """The kind of device that the ranks here get. Raises NodeError where the node lacks GPUs that it was given for."""
    count = visible_gpus(config)
    if count < processes and (count or config.device is Device.cuda):
        raise NodeError(f"this node has {count} GPUs, and each of its {processes} processes needs one")
    return "cuda" if count else "cpu"
