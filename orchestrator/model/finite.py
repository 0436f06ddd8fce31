"""Steps whose loss or gradient is not finite: found on the device without waiting for it, left out where wanted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True, slots=True)
class JudgedStep:
    """What one rank knows of a step."""

    number: int
    bad: torch.Tensor  # () bool: the step is not finite; the same on all ranks unless only losses were looked at
    bad_loss: torch.Tensor  # () bool: this rank's own loss is not
    ids: torch.Tensor  # (n,) int64 samples of this rank, on the CPU


@dataclass(slots=True)
class _OpenStep:
    buffers: list[torch.Tensor]
    """As they were before the step; empty where no step is ever left out."""
    tally: torch.Tensor
    bad_losses: list[torch.Tensor] = field(default_factory=list)
    ids: list[torch.Tensor] = field(default_factory=list)


class FiniteWatch:
    """Judges each step before the optimizer takes it.

    A loss that is not finite makes its whole gradient NaN, so that after the exchange every rank sees the same
    gradient and needs no other word to decide the same. Under a loss scale a gradient may overflow by design: there
    the loss alone counts, and the scale deals with the rest.
    """

    def __init__(self, skips: bool):
        """`skips`: leave such steps out, which waits for the device once a step; else they are only remembered."""
        self.skips = skips
        self.skipped = 0
        """Steps of the run that were left out."""
        self.in_a_row = 0
        """Of them, those since the last good one."""
        self.left_out = False
        """Whether the last step was."""
        self.agreed = True
        """Whether all ranks judge alike."""
        self._open: _OpenStep | None = None
        self._judged: list[JudgedStep] = []

    def counts(self) -> dict[str, int]:
        """What an attempt that goes on from here must know."""
        return {"steps": self.skipped, "in_a_row": self.in_a_row}

    def resume(self, counts: Mapping[str, int]) -> None:
        """Go on counting from an earlier attempt."""
        self.skipped, self.in_a_row = counts.get("steps", 0), counts.get("in_a_row", 0)

    def begin(self, net: nn.Module, tally: torch.Tensor) -> None:
        """Before each part of a step; the first one remembers what leaving the step out would bring back."""
        if self._open is None:
            buffers = [buffer.detach().clone() for buffer in net.buffers()] if self.skips else []
            self._open = _OpenStep(buffers, tally)

    def note(self, loss: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Take in the loss of one part and its samples; returns the factor for it, 1 or NaN."""
        if self._open is not None:
            self._open.bad_losses.append(~loss.detach().isfinite())
            self._open.ids.append(ids)
        return 1 + 0 * loss.detach()

    def judge(self, net: nn.Module, number: int, scaled: bool) -> torch.Tensor | None:
        """Whether to leave out step `number`, whose gradients are complete: then the tally before it, else None.

        The same decision on all ranks. `scaled`: under a loss scale.
        """
        opened, self._open = self._open, None
        assert opened is not None, "a step is judged after its parts"
        self.agreed = not scaled
        bad_loss, bad_gradient = torch.stack(opened.bad_losses).any(), ~has_finite_gradient(net.parameters())
        step = JudgedStep(number, bad_loss if scaled else bad_gradient, bad_loss, torch.cat(opened.ids))
        self.left_out = self.skips and bool(bad_gradient) and (not scaled or _any_rank(bad_loss))
        if self.left_out:
            self._leave_out(net, opened)
        else:
            self.in_a_row = 0
        if self.left_out or not self.skips:
            self._judged.append(step)
        return opened.tally if self.left_out else None

    def _leave_out(self, net: nn.Module, opened: _OpenStep) -> None:
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        with torch.no_grad():
            for buffer, before in zip(net.buffers(), opened.buffers, strict=True):
                buffer.copy_(before)

    def take(self) -> list[JudgedStep]:
        """The steps since the last call that need a look: those left out, or all where none ever is."""
        judged, self._judged = self._judged, []
        return judged


def has_finite_gradient(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """() bool: whether the norm of all gradients is finite: that is as fast as memory, a look at each is not."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).isfinite()


def has_finite_weights(net: nn.Module) -> torch.Tensor:
    """() bool: the same of the weights."""
    return torch.nn.utils.get_total_norm([parameter.detach() for parameter in net.parameters()]).isfinite()


def _any_rank(flag: torch.Tensor) -> bool:
    """Whether it is set on any rank; collective."""
    if not dist.is_initialized():
        return bool(flag)
    word = flag.to(torch.int32)
    dist.all_reduce(word, op=dist.ReduceOp.MAX)
    return bool(word)
