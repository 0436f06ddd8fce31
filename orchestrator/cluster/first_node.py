"""What the first node of a run on several tries alone, before the others are asked to spend anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orchestrator.bundle import Bundle, with_config
from orchestrator.cluster.canary import examine
from orchestrator.cluster.cause import Ended
from orchestrator.config import RunConfig


def alone(config: RunConfig, processes: int, world_size: int) -> RunConfig:
    """The run as one node can try it: its own processes, and as many images in each of them."""
    batch = max(processes * config.recipe.accumulate, config.recipe.global_batch_size * processes // world_size)
    return replace(
        config,
        compute=replace(config.compute, num_processes=str(processes), num_nodes=1, virtual_ranks="auto"),
        recipe=replace(config.recipe, global_batch_size=batch),
    )


def try_alone(bundle: Bundle, processes: int, world_size: int, say: Callable[[str], None]) -> Ended | None:
    """The canary on this node; how the run ends where it fails, None where it may begin."""
    for check in examine(with_config(bundle, alone(bundle.config, processes, world_size))):
        say(f"canary: {check.state} {check.name} ({check.seconds:.1f} s): {check.found}")
        if check.exit_code:
            return Ended(check.exit_code, None, f"canary: {check.name}: {check.found}")
    return None
