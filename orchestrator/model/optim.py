"""Parameter groups, the optimizer and the learning rate of a step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn, optim

from orchestrator.config import OptimizerConfig, RecipeConfig
from orchestrator.errors import ConfigError
from orchestrator.options import OptimizerKind, Schedule


def parameter_groups(model: nn.Module, weight_decay: float, decay_norm_and_bias: bool) -> list[dict[str, Any]]:
    """Every trainable parameter once, in the model's order: first those with weight decay, then those without.

    Without decay are vectors, scalars and biases, and what a timm model itself names in `no_weight_decay`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if decay_norm_and_bias:
        return [{"params": [p for _, p in named], "weight_decay": weight_decay}]
    exempt = _exempt_names(model)
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, p in named:
        (free if p.ndim <= 1 or name.rpartition(".")[2] == "bias" or name in exempt else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _exempt_names(model: nn.Module) -> set[str]:
    return set(getattr(model, "no_weight_decay", set)())


def build_optimizer(config: OptimizerConfig, model: nn.Module, lr: float) -> optim.Optimizer:
    """The optimizer of `config` at the rate `lr` (see `peak_lr`).

    timm's LAMB clips the gradient's global norm at 1 by itself; torch's RMSprop smooths squares with 0.99.
    """
    groups = parameter_groups(model, config.weight_decay, config.decay_norm_and_bias)
    betas, eps, momentum = (config.betas[0], config.betas[1]), config.eps, config.momentum
    match config.kind:
        case OptimizerKind.sgd:
            return optim.SGD(groups, lr=lr, momentum=momentum, nesterov=_nesterov(config))
        case OptimizerKind.adamw:
            return optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
        case OptimizerKind.rmsprop:
            return optim.RMSprop(groups, lr=lr, eps=eps, momentum=momentum)
        case OptimizerKind.lamb:
            return _timm_optimizer("Lamb")(groups, lr=lr, betas=betas, eps=eps)
        case OptimizerKind.lars:
            return _timm_optimizer("Lars")(groups, lr=lr, eps=eps, momentum=momentum, nesterov=_nesterov(config))


def _timm_optimizer(name: str) -> Any:
    # timm takes seconds to import.
    import timm.optim

    return getattr(timm.optim, name)


def _nesterov(config: OptimizerConfig) -> bool:
    if config.nesterov and config.momentum == 0:
        raise ConfigError(
            "optimizer.nesterov",
            True,
            "needs optimizer.momentum above 0",
            "optimizer.momentum=0.9 or optimizer.nesterov=false",
        )
    return config.nesterov


def peak_lr(optimizer: OptimizerConfig, global_batch_size: int) -> float:
    """`lr` scaled linearly from `base_batch_size` to the batch at hand: https://arxiv.org/abs/1706.02677."""
    if optimizer.base_batch_size is None:
        return optimizer.lr
    return optimizer.lr * global_batch_size / optimizer.base_batch_size


def learning_rate_factor(recipe: RecipeConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Share of the peak rate at optimizer step `step` of 0 .. total_steps - 1.

    The warm-up rises linearly from `warmup_factor` at step 0 to 1 at its end; cosine and linear reach `final_factor`
    at the last step.
    """
    warmup_steps = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return recipe.warmup_factor + (1 - recipe.warmup_factor) * step / warmup_steps
    span = total_steps - 1 - warmup_steps
    progress = min(1.0, (step - warmup_steps) / span) if span > 0 else 0.0
    match recipe.schedule:
        case Schedule.cosine:
            return recipe.final_factor + (1 - recipe.final_factor) * (1 + math.cos(math.pi * progress)) / 2
        case Schedule.linear:
            return 1 + (recipe.final_factor - 1) * progress
        case Schedule.step:
            return recipe.step_factor ** sum(step >= epoch * steps_per_epoch for epoch in recipe.step_epochs)
        case Schedule.constant:
            return 1.0
