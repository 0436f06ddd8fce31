"""Lightning's side of virtual ranks: a process computes its slices of a step as if each were a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.errors import ConfigError
from orchestrator.model.module import Classifier
from orchestrator.train.exchange import TreeExchange, tree_hook
from orchestrator.train.virtual import Partial, carry

Gradients = Mapping[torch.Tensor, torch.Tensor]
"""By parameter."""


class Slices(pl.Callback):
    """Keeps the slices of a step apart and adds their gradients up in the order of the tree.

    Each slice starts from the buffers that the first virtual rank left after the step before, and the first one's
    changes stay, which is what DDP does with the buffers of its ranks.
    """

    def __init__(self, module: Classifier):
        self.exchange: TreeExchange | None = None
        self._module, self._slices = module, module.span.slices
        self._parameters = [parameter for parameter in module.net.parameters() if parameter.requires_grad]
        self._buffers = list(module.net.buffers())
        self._before, self._first = ([torch.empty_like(buffer) for buffer in self._buffers] for _ in range(2))
        self._waiting: list[Partial[Gradients]] = []
        self._at = module.place(0)
        require_own_statistics(module.net, self._slices)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wrapper = trainer.strategy.model
        if not isinstance(wrapper, DistributedDataParallel):
            return
        group = dist.new_group(backend=dist.get_backend())
        assert isinstance(group, dist.ProcessGroup)
        self.exchange = TreeExchange(group, self._add_waiting)
        wrapper.register_comm_hook(self.exchange, tree_hook)
        # The wrapper fetches the first process's buffers at the start of a step, then calls the module.
        pl_module.register_forward_pre_hook(lambda module, arguments: self._begin())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._at = self._module.place(batch_idx)
        if self.exchange is None:
            self._begin()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._at.ends_slice:
            return
        if self._slices > 1:
            self._end_slice()
        if self.exchange is not None:
            self.exchange.require_whole()

    def _begin(self) -> None:
        if self._slices > 1 and self._at.part == 0:
            _copy(self._buffers, self._before) if self._at.slice else _copy(self._before, self._buffers)

    def _end_slice(self) -> None:
        if self._at.slice == 0:
            _copy(self._first, self._buffers)
        if self._at.slice < self._slices - 1:
            carry(self._waiting, self._take_gradients(), _add)
            return
        if self.exchange is None:
            having = _gradients(self._parameters)
            self._add_waiting(list(having), list(having.values()))
        self._waiting.clear()
        _copy(self._buffers, self._first)

    def _take_gradients(self) -> Gradients:
        taken = _gradients(self._parameters)
        for parameter in taken:
            parameter.grad = None
        return taken

    @torch.no_grad()
    def _add_waiting(self, parameters: Sequence[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        for _, total in reversed(self._waiting):
            torch._foreach_add_(gradients, [total[parameter] for parameter in parameters])  # pyright: ignore


def _gradients(parameters: Sequence[torch.Tensor]) -> Gradients:
    return {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}


@torch.no_grad()
def _add(earlier: Gradients, later: Gradients) -> Gradients:
    """In place of the earlier ones."""
    torch._foreach_add_([earlier[parameter] for parameter in later], list(later.values()))  # pyright: ignore
    return earlier


@torch.no_grad()
def _copy(to: list[torch.Tensor], source: list[torch.Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, source)  # pyright: ignore


def require_own_statistics(net: nn.Module, slices: int) -> None:
    """Refuse statistics over all ranks where one process computes several of them one after another."""
    found = [name for name, module in net.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    if found and slices > 1:
        raise ConfigError(
            "compute.virtual_ranks",
            "of more than there are processes",
            f"cannot serve a model with SyncBatchNorm ({found[0]}): its statistics need all {slices} slices at once",
            "compute.virtual_ranks=off, or as many processes as virtual ranks",
        )
