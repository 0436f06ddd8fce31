"""How long a rank waits for its peers inside a step, told apart from what it computes itself."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Moment = float | torch.cuda.Event


class PeerWait(pl.Callback):
    """Sums the waits of a rank: before its forward for the buffers of the first rank, after its backward for gradients.

    What lies between the entry of the wrapper that talks to the other ranks and the entry of the module itself is the
    first; what lies between the last gradient of its own and the end of backward is the second. On a GPU both are
    taken on its stream and read later, so that nothing waits for them. Alone, a rank waits for nobody.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._entered: Moment | None = None
        self._ready: Moment | None = None
        self._hooks: dict[str, RemovableHandle] = {}
        self._last = ""

    @property
    def seconds(self) -> float:
        """All waits so far, on a GPU those that it has been through."""
        while self._open and self._open[0][1].query():
            began, ended = self._open.pop(0)
            self._seconds += began.elapsed_time(ended) / 1000
        return self._seconds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wrapper = trainer.strategy.model
        if wrapper is None or wrapper is pl_module or trainer.world_size == 1:
            return
        wrapper.register_forward_pre_hook(self._enter)
        pl_module.register_forward_pre_hook(self._begin)
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                self._hooks[name] = parameter.register_post_accumulate_grad_hook(partial(self._take_time, name))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(self._ready)
        self._ready = None
        while len(self._hooks) > 1 and self._last in self._hooks:  # the order of gradients stays: one hook is enough
            name = next(name for name in self._hooks if name != self._last)
            self._hooks.pop(name).remove()

    def _enter(self, wrapper: nn.Module, arguments: Any) -> None:
        self._entered = self._now()

    def _begin(self, module: nn.Module, arguments: Any) -> None:
        self._count(self._entered)
        self._entered = None

    def _take_time(self, name: str, parameter: torch.Tensor) -> None:
        self._last, self._ready = name, self._now()

    def _now(self) -> Moment:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count(self, began: Moment | None) -> None:
        ended = self._now() if began is not None else None
        if isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
            self._open.append((began, ended))
        elif isinstance(began, float) and isinstance(ended, float):
            self._seconds += ended - began
