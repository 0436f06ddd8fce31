"""What a run was predicted to take, for whoever asks why it ended for want of it."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from orchestrator.cluster.job import num_processes
from orchestrator.errors import OrchestratorError
from orchestrator.options import Device
from orchestrator.plain import from_dict
from orchestrator.track.words import size
from orchestrator.train.needs import rows_of

GIB = 2**30
ALONE_GIB = 0.7
"""A process that holds no model: torch and Lightning, measured by its own share of what is shared."""
SPARE = 1.25
"""For what the allocator keeps and the loaders hold."""


def predicted_memory(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """`memory`: what the steps of one node take, in words; `gib_per_process`: enough of it. `run`: run.json's content.

    None where the steps compute on a GPU, whose memory is not the host's, and where the config is another version's.
    """
    from orchestrator.train.footprint import trace_step  # imports torch: seconds

    try:
        config = from_dict(run["config"])
    except OrchestratorError:
        return None
    if config.compute.device is not Device.cpu:
        return None
    processes = num_processes(config)
    foot = trace_step(config, config.model.num_classes or 1000, rows_of(config, processes))
    here = ceil(processes / config.compute.num_nodes)
    times = f"{here} x {size(foot.peak)} = " if here > 1 else ""
    told = f"{times}{size(here * foot.peak)} for a step, besides what a process takes by itself (0.5 to 0.7 GiB)"
    return {"memory": told, "gib_per_process": ceil(4 * (foot.peak / GIB + ALONE_GIB) * SPARE) / 4}
