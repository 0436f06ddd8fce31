"""Steps that are not finite are found, and leaving one out leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orchestrator.model.finite import FiniteWatch, has_finite_gradient, has_finite_weights

TALLY = torch.arange(5, dtype=torch.float64)
NAN, INF = float("nan"), float("inf")


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def take_step(watch: FiniteWatch, net: nn.Module, rows: torch.Tensor, number: int = 1) -> torch.Tensor | None:
    """One step of two parts."""
    net.zero_grad()
    for part in rows.chunk(2):
        watch.begin(net, TALLY)
        loss = net(part).square().sum()
        (loss * watch.note(loss, torch.arange(len(part)))).backward()
    return watch.judge(net, number, scaled=False)


@pytest.mark.parametrize("skips", [False, True])
def test_a_finite_step_keeps_every_bit_of_its_gradient(skips: bool) -> None:
    rows = torch.randn(8, 3)
    plain, watched = make_net(), make_net()
    for part in rows.chunk(2):
        plain(part).square().sum().backward()
    watch = FiniteWatch(skips)
    assert take_step(watch, watched, rows) is None
    assert (watch.counts(), watch.left_out) == ({"steps": 0, "in_a_row": 0}, False)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # pyright: ignore[reportArgumentType]
    assert [bool(step.bad) for step in watch.take()] == ([] if skips else [False])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("row", [0, 7])
def test_a_step_that_is_left_out_leaves_the_buffers_and_the_tally_as_they_were(value: float, row: int) -> None:
    net, rows = make_net(), torch.randn(8, 3)
    watch = FiniteWatch(skips=True)
    take_step(watch, net, rows)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    rows[row] = value
    assert take_step(watch, net, rows, 2) is TALLY
    assert watch.left_out
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name
    (step,) = watch.take()
    assert (step.number, bool(step.bad), bool(step.bad_loss), len(step.ids)) == (2, True, True, 8)
    assert take_step(watch, net, torch.randn(8, 3), 3) is None
    assert watch.counts() == {"steps": 1, "in_a_row": 0}


def test_steps_in_a_row_are_counted_over_attempts() -> None:
    net, rows = make_net(), torch.full((8, 3), NAN)
    first, second = FiniteWatch(skips=True), FiniteWatch(skips=True)
    for number in (1, 2, 3):
        take_step(first, net, rows, number)
    second.resume(first.counts())
    take_step(second, net, rows, 4)
    assert second.counts() == {"steps": 4, "in_a_row": 4}


def test_an_infinite_loss_with_a_finite_gradient_is_seen_in_the_gradient() -> None:
    weight = nn.Parameter(torch.ones(2))
    watch = FiniteWatch(skips=True)
    watch.begin(nn.Identity(), TALLY)
    loss = weight.sum() + torch.tensor(INF)
    assert loss.isinf()
    (loss * watch.note(loss, torch.tensor([0]))).backward()
    assert not has_finite_gradient([weight])


def test_a_loss_scale_may_overflow_a_gradient_and_only_the_loss_counts() -> None:
    net = make_net()
    for loss_value, left_out in ((1.0, False), (NAN, True)):
        watch = FiniteWatch(skips=True)
        watch.begin(net, TALLY)
        watch.note(torch.tensor(loss_value), torch.tensor([0]))
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, INF)
        assert (watch.judge(net, 1, scaled=True) is not None) is left_out
        assert not watch.agreed


def test_weights_are_judged_too() -> None:
    net = make_net()
    assert has_finite_weights(net)
    next(net.parameters()).data[0, 0] = INF
    assert not has_finite_weights(net)
