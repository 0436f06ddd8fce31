"""The memory that a step needs, and its arithmetic, from tracing the real step without computing anything.

The step runs on fake tensors, which have shapes and no bytes; every storage that an operation makes counts until it is
freed. What a device's library takes besides (its context, workspaces of convolutions, fragments) is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.config import RunConfig
from orchestrator.data.stream import Batch
from orchestrator.model.ema import ExponentialMovingAverage
from orchestrator.model.module import Classifier, Span
from orchestrator.model.zoo import build_model
from orchestrator.options import Precision

AUTOCAST = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes that are held after an operation of a phase of the step."""

    phase: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of one process, in bytes."""

    rows: int
    """Images that it computes at once."""
    weights: int
    buffers: int
    optimizer: int
    moving_average: int
    peak: int
    """Of the second step, whose optimizer has its state."""
    flops_per_image: int
    """Forward and backward, a multiplication and its addition counted as two."""
    timeline: tuple[Moment, ...]

    @property
    def kept(self) -> int:
        """Between two steps."""
        return self.weights + self.buffers + self.optimizer + self.moving_average

    @property
    def within_a_step(self) -> int:
        """Images, activations, gradients and what operations need besides, at the peak."""
        return self.peak - self.kept


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages from the operation that makes them to their end."""

    def __init__(self):
        super().__init__()
        self.phase, self.now, self.timeline = "", 0, list[Moment]()
        self._sizes: dict[int, int] = {}

    def enter(self, phase: str) -> None:
        self.phase = phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        if not self.timeline or self.timeline[-1].nbytes != self.now:
            self.timeline.append(Moment(self.phase, self.now))
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def trace_step(config: RunConfig, num_classes: int, rows: int) -> Footprint:
    """The footprint of a process that computes `rows` images at once."""
    with torch.device("meta"):
        net = build_model(config.model, num_classes)
        ema = moving_average(net, config)
    # traced on the CPU's rules: the backward pass of fake tensors of a GPU needs a GPU
    with FakeTensorMode(), LiveBytes() as live:
        for module in filter(None, (net, ema)):
            _make_fake(module, config.compute.channels_last)
        step = Step(net, ema, config, rows)
        step.run(live.enter)
        live.timeline.clear()
        kept = live.now
        with FlopCounterMode(display=False) as flops:
            step.run(live.enter)
    sizes = step.sizes()
    timeline = (Moment("kept", kept), *live.timeline)
    peak = max(moment.nbytes for moment in timeline)
    return Footprint(rows=rows, peak=peak, flops_per_image=flops.get_total_flops() // rows, timeline=timeline, **sizes)


class Numbers:
    """Sample numbers on the host, which a step draws from: they must be there although the images are not."""

    device = torch.device("cpu")

    def __init__(self, rows: int):
        self._rows = rows

    def numpy(self) -> np.ndarray:
        return np.arange(self._rows)


class Step:
    """One process's part of a step as `fit` computes it, without its loader, its peers and Lightning."""

    def __init__(self, net: nn.Module, ema: ExponentialMovingAverage | None, config: RunConfig, rows: int):
        self._ema, self._config, self._rows = ema, config, rows
        self._device = next(net.parameters()).device
        self._module = Classifier(net, config, Span(0, 1, 1, 0, 1, 1))
        self._module._host_ids = torch.arange(rows)
        self._optimizer = self._module.configure_optimizers()

    def run(self, enter: Callable[[str], None]) -> None:
        side, rows, dtype = self._config.data.image_size, self._rows, AUTOCAST.get(self._config.compute.precision)
        enter("forward")
        images = torch.zeros(rows, 3, side, side, dtype=torch.uint8, device=self._device)
        ids = torch.arange(rows, device=self._device)
        batch = Batch(images, torch.zeros_like(ids), ids, rows, 0, cast("torch.Tensor", Numbers(rows)))
        with torch.autocast(self._device.type, dtype, enabled=dtype is not None):
            loss = self._module.training_step(batch, 0)
        enter("backward")
        loss.backward()
        enter("optimizer")
        self._optimizer.step()
        if self._ema is not None:
            self._follow(self._ema)
        self._optimizer.zero_grad()

    @torch.no_grad()
    def _follow(self, ema: ExponentialMovingAverage) -> None:
        """What `update_parameters` does once it has counted its first step, a number that fake tensors do not have."""
        pairs = zip(_tensors(ema.module), _tensors(self._module.net), strict=True)
        averaged, current = zip(*((a, b) for a, b in pairs if a.is_floating_point()), strict=True)
        ema.multi_avg_fn(list(averaged), list(current), 1)  # pyright: ignore[reportOptionalCall]

    def sizes(self) -> dict[str, int]:
        state = [value for values in self._optimizer.state.values() for value in values.values()]
        average = [] if self._ema is None else _tensors(self._ema)
        return {
            "weights": _nbytes(self._module.net.parameters()),
            "buffers": _nbytes(self._module.buffers()),
            "optimizer": _nbytes(value for value in state if isinstance(value, torch.Tensor)),
            "moving_average": _nbytes(average),
        }


def moving_average(net: nn.Module, config: RunConfig) -> ExponentialMovingAverage | None:
    return ExponentialMovingAverage(net, config.recipe.ema_decay) if config.recipe.ema_decay else None


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _make_fake(net: nn.Module, channels_last: bool) -> None:
    """Replace the parameters and buffers of a network on `meta` by fake ones on the CPU."""
    made: dict[int, torch.Tensor] = {}

    def new(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            form = torch.channels_last if channels_last and tensor.dim() == 4 else torch.contiguous_format
            fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", memory_format=form)
            kept = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if kept else fresh
        return made[id(tensor)]

    for module in net.modules():
        for slots in (module._parameters, module._buffers):
            slots.update({name: new(tensor) for name, tensor in slots.items() if tensor is not None})  # pyright: ignore


def largest_rows(limit: int, footprint_of: Callable[[int], Footprint]) -> int:
    """Most rows whose peak stays within `limit` bytes, 0 where not even one does.

    The peak grows nearly by the same bytes with every row, so a line through two footprints says where to look next.
    """
    fits, rows, last = 0, 16, footprint_of(8)
    too_many = 1 << 30
    while fits + 1 < too_many:
        now = footprint_of(rows)
        if now.peak <= limit:
            fits = max(fits, rows)
        else:
            too_many = min(too_many, rows)
        slope = (now.peak - last.peak) / max(1, abs(now.rows - last.rows)) * (1 if now.rows > last.rows else -1)
        guess = rows + int((limit - now.peak) / max(1.0, slope))
        rows, last = min(max(guess, fits + 1), too_many - 1), now
    return fits
