"""The average of the weights follows the textbook formula and survives a save."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from orchestrator.model.ema import ExponentialMovingAverage


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4 * 4, 2))


def states_of_training(net: nn.Module, ema: ExponentialMovingAverage, steps: int) -> list[dict[str, torch.Tensor]]:
    """Train with a large rate, so that every step moves every tensor; the model's state after each."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    states = []
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 3, 6, 6) + 2).square().mean().backward()
        optimizer.step()
        ema.update_parameters(net)
        states.append(copy.deepcopy(net.state_dict()))
    return states


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_three_updates_equal_the_formula_for_weights_and_running_statistics(decay):
    net = model()
    ema = ExponentialMovingAverage(net, decay)
    first, second, third = states_of_training(net, ema, 3)
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            expected = decay * (decay * first[name] + (1 - decay) * second[name]) + (1 - decay) * third[name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
            assert not torch.equal(first[name], third[name]), name
    assert ema.module.state_dict()["1.num_batches_tracked"] == 3
    assert ema.n_averaged == 3


def test_the_average_trains_nothing_and_leaves_the_model_alone():
    net = model()
    before = copy.deepcopy(net.state_dict())
    ema = ExponentialMovingAverage(net, 0.9)
    ema.update_parameters(net)
    assert not [p for p in ema.parameters() if p.requires_grad]
    assert all(p.requires_grad for p in net.parameters())
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not {id(p) for p in net.parameters()} & {id(p) for p in ema.parameters()}


def test_going_on_from_a_saved_average_gives_the_same_bits(tmp_path):
    net = model()
    ema = ExponentialMovingAverage(net, 0.9)
    states_of_training(net, ema, 2)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    resumed = ExponentialMovingAverage(model(), 0.9)
    resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    states_of_training(net, ema, 1)
    resumed.update_parameters(net)
    assert resumed.state_dict().keys() == ema.state_dict().keys()
    assert all(torch.equal(value, ema.state_dict()[name]) for name, value in resumed.state_dict().items())
