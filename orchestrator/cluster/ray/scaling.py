"""What a run asks of a Ray cluster: workers, their resources, where they lie."""

from __future__ import annotations

from collections.abc import Mapping

import ray
import ray.train

from orchestrator.config import RunConfig, process_range
from orchestrator.options import Device, Where

GIB = 1 << 30


def scaling_of(config: RunConfig, cluster: Mapping[str, float]) -> ray.train.ScalingConfig:
    """One worker for each process; `min:max` is Ray's elastic range. `cluster`: resources of all nodes."""
    low, high = process_range(config.compute.num_processes) or (1, 1)
    resources = resources_of(config, cluster)
    return ray.train.ScalingConfig(
        num_workers=high if low == high else (low, high),
        use_gpu="GPU" in resources,
        resources_per_worker=resources,
        placement_strategy=config.cluster.placement.name,
    )


def resources_of(config: RunConfig, cluster: Mapping[str, float]) -> dict[str, float]:
    """Of one process. The nodes of a RayJob are pods of our making: each CPU that they tell Ray of is one process."""
    device = config.compute.device
    use_gpu = device is Device.cuda or (device is Device.auto and cluster.get("GPU", 0) > 0)
    gpu = {"GPU": 1.0} if use_gpu else {}
    if config.cluster.where is Where.kubernetes:
        return {"CPU": 1.0, **gpu}
    return {"CPU": config.cluster.cpus_per_process, "memory": config.cluster.memory_gib_per_process * GIB, **gpu}


def told_wants(config: RunConfig) -> str:
    """What the run asks for and what the cluster has, as a person reads it."""
    every, free = ray.cluster_resources(), ray.available_resources()
    wanted = resources_of(config, every)
    each = ", ".join(_amount(name, value) for name, value in wanted.items())
    have = ", ".join(
        f"{_amount(name, free.get(name, 0.0))} of {_amount(name, every.get(name, 0.0))}" for name in wanted
    )
    processes, placement = config.compute.num_processes, config.cluster.placement.name
    return f"{processes} x ({each}), {placement}; the cluster has {have} free"


def _amount(name: str, value: float) -> str:
    return f"{value / GIB:.1f} GiB memory" if name == "memory" else f"{value:g} {name}"
