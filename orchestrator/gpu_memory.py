"""The check of `make gpu-check` that the device's own peak is the one that `plan` predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.gpu_check import CheckFailed, Setting

WITHIN = 0.1
"""Of the prediction; what cuDNN takes for its own work is not foreseen."""


def compare_memory(setting: Setting, *, overrides: Sequence[str], rows: int) -> dict[str, Any]:
    """Bytes of a real step of `rows` images, and of its trace; on a CPU no allocator tells, and nothing is compared."""
    import torch

    from orchestrator.compose import compose
    from orchestrator.train.assembly import build_net
    from orchestrator.train.footprint import Step, moving_average, trace_step

    config = compose(list(overrides)).config
    classes, device = config.model.num_classes or 1000, torch.device(setting.device)
    predicted = trace_step(config, classes, rows).peak
    net = build_net(config, classes, device)
    step = Step(net, moving_average(net, config), config, rows)
    step.run(lambda phase: None)  # the optimizer's state is made in the first
    if device.type == "cpu":
        step.run(lambda phase: None)
        return {"predicted": predicted, "measured": None}
    torch.cuda.reset_peak_memory_stats()
    step.run(lambda phase: None)
    measured = torch.cuda.max_memory_allocated()
    figures = {"predicted": predicted, "measured": measured, "ratio": predicted / measured}
    if abs(figures["ratio"] - 1) > WITHIN:
        raise CheckFailed(
            f"the prediction is {figures['ratio']:.2f} of what a step takes, not within {WITHIN:.0%}", figures
        )
    return figures
