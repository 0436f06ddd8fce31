"""Groups, optimizers and schedules against hand-computed values and torch's own."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from orchestrator.config import OptimizerConfig, RecipeConfig
from orchestrator.errors import ConfigError
from orchestrator.model.optim import build_optimizer, learning_rate_factor, parameter_groups, peak_lr
from orchestrator.model.resnet import ResNetOptions, cifar_resnet
from orchestrator.options import Loss, OnNan, OptimizerKind, Schedule, Stem


def recipe(**changes: Any) -> RecipeConfig:
    values: dict[str, Any] = {
        "epochs": 10,
        "global_batch_size": 64,
        "accumulate": 1,
        "schedule": Schedule.cosine,
        "warmup_epochs": 0.0,
        "warmup_factor": 0.01,
        "final_factor": 0.0,
        "step_epochs": [],
        "step_factor": 0.1,
        "label_smoothing": 0.0,
        "ema_decay": 0.0,
        "ema_every_steps": 1,
        "clip_norm": 0.0,
        "on_nan": OnNan.stop,
        "loss": Loss.cross_entropy,
        "mixup": 0.0,
        "cutmix": 0.0,
        "mix_probability": 1.0,
        "erase": 0.0,
        "source": None,
        "published_top1": None,
        "reproduced_top1": None,
    }
    return RecipeConfig(**values | changes)


def optimizer(**changes: Any) -> OptimizerConfig:
    values: dict[str, Any] = {
        "kind": OptimizerKind.sgd,
        "lr": 0.1,
        "base_batch_size": 256,
        "momentum": 0.9,
        "nesterov": False,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.05,
        "decay_norm_and_bias": False,
    }
    return OptimizerConfig(**values | changes)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return cifar_resnet(20, 10, ResNetOptions(stem=Stem.small))


def factors(config: RecipeConfig, steps_per_epoch: int, total_steps: int) -> list[float]:
    return [learning_rate_factor(config, step, steps_per_epoch, total_steps) for step in range(total_steps)]


@pytest.mark.parametrize("everything", [False, True])
def test_every_trainable_parameter_is_in_exactly_one_group_in_the_models_order(everything):
    model = small_net()
    model.get_parameter("layer1.0.conv1.weight").requires_grad_(False)
    grouped = [p for group in parameter_groups(model, 0.05, everything) for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, grouped)) == sorted(map(id, trainable))
    position = {id(p): i for i, p in enumerate(trainable)}
    for group in parameter_groups(model, 0.05, everything):
        order = [position[id(p)] for p in group["params"]]
        assert order == sorted(order)


def test_vectors_and_biases_carry_no_decay_unless_told():
    model = small_net()
    decayed, free = parameter_groups(model, 0.05, False)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])
    (only,) = parameter_groups(model, 0.05, True)
    assert only["weight_decay"] == 0.05


def test_a_bias_of_two_dimensions_and_what_the_model_exempts_carry_no_decay():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(2, 2))
            self.inner = nn.ParameterDict({"bias": torch.zeros(2, 2)})
            self.position = nn.Parameter(torch.zeros(2, 2))
            self.kernel = nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self) -> set[str]:
            return {"position"}

    model = Tokens()
    decayed, free = parameter_groups(model, 0.05, False)
    assert [id(p) for p in decayed["params"]] == [id(model.kernel)]
    assert {id(p) for p in free["params"]} == {id(model.bias), id(model.inner["bias"]), id(model.position)}


def test_a_shared_parameter_is_listed_once_and_an_empty_group_not_at_all():
    layer = nn.Linear(3, 3, bias=False)
    (group,) = parameter_groups(nn.Sequential(layer, layer), 0.1, False)
    assert [id(p) for p in group["params"]] == [id(layer.weight)]


@pytest.mark.parametrize("kind", OptimizerKind)
def test_every_optimizer_steps_moves_all_weights_and_resumes_bit_for_bit(kind):
    config = optimizer(kind=kind)
    net, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    built = build_optimizer(config, net, lr=0.01)
    start = [p.detach().clone() for p in net.parameters()]
    x = torch.randn(8, 4)

    def step(model: nn.Module, stepper: torch.optim.Optimizer) -> None:
        stepper.zero_grad()
        model(x).square().sum().backward()
        stepper.step()

    step(net, built)
    assert all(not torch.equal(before, after) for before, after in zip(start, net.parameters(), strict=True))
    twin.load_state_dict(net.state_dict())
    resumed = build_optimizer(config, twin, lr=0.01)
    resumed.load_state_dict(copy.deepcopy(built.state_dict()))
    step(net, built)
    step(twin, resumed)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("sgd", {"nesterov": True}, {"lr": 0.3, "momentum": 0.9, "nesterov": True}),
        ("adamw", {"betas": [0.8, 0.95], "eps": 1e-6}, {"lr": 0.3, "betas": (0.8, 0.95), "eps": 1e-6}),
        ("rmsprop", {"momentum": 0.7, "eps": 1e-3}, {"lr": 0.3, "momentum": 0.7, "eps": 1e-3}),
        ("lamb", {"betas": [0.8, 0.95], "eps": 1e-6}, {"lr": 0.3, "betas": (0.8, 0.95), "eps": 1e-6}),
        ("lars", {"momentum": 0.7, "nesterov": True}, {"lr": 0.3, "momentum": 0.7, "nesterov": True}),
    ],
)
def test_every_value_of_the_config_arrives_in_the_optimizer(kind, changes, expected):
    built = build_optimizer(optimizer(kind=OptimizerKind(kind), **changes), small_net(), lr=0.3)
    assert type(built).__name__.lower() == kind
    assert [group["weight_decay"] for group in built.param_groups] == [0.05, 0.0]
    for group in built.param_groups:
        assert {key: group[key] for key in expected} == expected


def test_nesterov_without_momentum_is_refused_by_key():
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov = True: needs optimizer\.momentum above 0"):
        build_optimizer(optimizer(nesterov=True, momentum=0.0), small_net(), lr=0.1)


@pytest.mark.parametrize(
    ("base", "batch", "lr"), [(256, 256, 0.1), (256, 8192, 3.2), (256, 64, 0.025), (None, 8192, 0.1)]
)
def test_the_peak_rate_grows_linearly_with_the_global_batch(base, batch, lr):
    assert peak_lr(optimizer(base_batch_size=base), batch) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": Schedule.constant}, [1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": Schedule.linear}, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]),
        ({"schedule": Schedule.linear, "final_factor": 0.2}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
        ({"schedule": Schedule.cosine}, [1, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583, 0.1464466, 0.0380602, 0]),
        (
            {"schedule": Schedule.cosine, "warmup_epochs": 1.0, "warmup_factor": 0.25, "final_factor": 0.1},
            [
                0.25,
                0.5,
                0.75,
                1,
                1 - 0.9 * 0.0954915,
                1 - 0.9 * 0.3454915,
                1 - 0.9 * 0.6545085,
                1 - 0.9 * 0.9045085,
                0.1,
            ],
        ),
        ({"schedule": Schedule.step, "step_epochs": [1, 2]}, [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]),
        (
            {"schedule": Schedule.step, "step_epochs": [2], "warmup_epochs": 2 / 3, "warmup_factor": 0.0},
            [0, 0.5, 1, 1, 1, 1, 0.1, 0.1, 0.1],
        ),
    ],
)
def test_factors_of_three_epochs_of_three_steps_are_these(changes, expected):
    assert factors(recipe(**changes), 3, 9) == pytest.approx(expected, abs=1e-7)


TORCH = {
    Schedule.cosine: lambda o, total, per_epoch: lr_scheduler.CosineAnnealingLR(o, T_max=total - 1, eta_min=0.05),
    Schedule.linear: lambda o, total, per_epoch: lr_scheduler.LinearLR(o, 1.0, 0.05, total_iters=total - 1),
    Schedule.step: lambda o, total, per_epoch: lr_scheduler.MultiStepLR(o, [3 * per_epoch, 5 * per_epoch], 0.1),
    Schedule.constant: lambda o, total, per_epoch: lr_scheduler.ConstantLR(o, factor=1.0),
}


@pytest.mark.parametrize("warmup_steps", [0, 10])
@pytest.mark.parametrize("schedule", Schedule)
def test_factors_equal_torchs_own_schedulers(schedule, warmup_steps):
    per_epoch, total = 10, 70
    stepper = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    moved = per_epoch if schedule is not Schedule.step else 0
    main = TORCH[schedule](stepper, total - (moved if warmup_steps else 0), per_epoch)
    expected = []
    for step in range(total):
        offset = warmup_steps if schedule is not Schedule.step else 0
        if step < warmup_steps:
            expected.append(0.2 + 0.8 * step / warmup_steps)
        else:
            expected.append(stepper.param_groups[0]["lr"])
        stepper.step()
        if step >= offset:
            main.step()
    config = recipe(
        epochs=7,
        schedule=schedule,
        final_factor=0.05,
        step_epochs=[3, 5],
        warmup_epochs=warmup_steps / per_epoch,
        warmup_factor=0.2,
    )
    assert factors(config, per_epoch, total) == pytest.approx(expected, abs=1e-9)


def test_the_warm_up_equals_torchs_linear_one():
    stepper = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = lr_scheduler.LinearLR(stepper, start_factor=0.25, total_iters=12)
    expected = []
    for _ in range(20):
        expected.append(stepper.param_groups[0]["lr"])
        stepper.step()
        warmup.step()
    config = recipe(schedule=Schedule.constant, warmup_epochs=3.0, warmup_factor=0.25)
    assert factors(config, 4, 20) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("warmup_epochs", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("per_epoch", "total"), [(1, 1), (1, 3), (4, 2), (4, 12), (7, 21)])
def test_on_any_grid_the_factor_stays_in_bounds_rises_in_the_warm_up_and_never_after(
    schedule, warmup_epochs, per_epoch, total
):
    config = recipe(schedule=schedule, warmup_epochs=warmup_epochs, step_epochs=[1, 2], final_factor=0.1)
    values = factors(config, per_epoch, total)
    assert all(0 < value <= 1 for value in values)
    warmup = min(round(warmup_epochs * per_epoch), total)
    assert all(a < b for a, b in pairwise(values[: warmup + 1]) if schedule is not Schedule.step)
    assert all(a >= b for a, b in pairwise(values[warmup:]))
    if schedule in (Schedule.cosine, Schedule.linear) and total - warmup > 1:
        assert values[-1] == pytest.approx(0.1)
    assert learning_rate_factor(config, total + 5, per_epoch, total) <= 1
