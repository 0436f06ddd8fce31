"""The measuring checks of `make gpu-check`, and what all of its checks build on.

Each takes a `Setting`, returns figures and raises `CheckFailed` on a wrong result; each has a process of its own and
leaves global switches as it set them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from itertools import pairwise
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from orchestrator.gpu_check import CheckFailed, Setting
from orchestrator.probes import read_gpus

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Figures = dict[str, Any]
Batch = tuple["Tensor", "Tensor"]

GIB = 1 << 30
NUM_CLASSES = 1000
BRANCH_GAIN = 0.1
"""Last norm weight of each block. At 1 the gradient of a random ResNet-50 is chaotic: its bf16 gradient has a cosine
of 0.14 with the fp32 one though nothing is wrong; at 0.1, as in a trained network, it has 0.99 (measured on a CPU)."""
LEAST_GB_PER_S = 0.5
"""Pinned copies slower than this starve a GPU: 3,300 images/s of 224 x 224 uint8 pixels need it."""
FREE_MEMORY = 0.8
"""Share of the GPU's memory that must be free: figures taken beside another program are worth nothing."""


def set_arithmetic(*, tf32: bool = False, benchmark: bool = False, deterministic: bool = False) -> None:
    """The legacy TF32 switches on purpose: torch's compiler reads them, and refuses a mix with the new ones."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(deterministic)


def build_model(setting: Setting, *, channels_last: bool = False) -> nn.Module:
    """The same seeded network on every call, with damped residual branches."""
    import torch
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, setting.arch)(num_classes=NUM_CLASSES)
    for block in model.modules():
        last_norm = getattr(block, "bn3", None) or getattr(block, "bn2", None)
        if last_norm is not None:
            torch.nn.init.constant_(last_norm.weight, BRANCH_GAIN)
    return model.to(setting.device, memory_format=_layout(channels_last)).train()


def make_batch(setting: Setting, batch: int, *, channels_last: bool = False) -> Batch:
    """Seeded images  # (B, 3, H, W) float32, and labels  # (B,) int64."""
    import torch

    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, setting.image_size, setting.image_size, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (batch,), generator=generator)
    return images.to(setting.device, memory_format=_layout(channels_last)), labels.to(setting.device)


def _layout(channels_last: bool) -> torch.memory_format:
    import torch

    return torch.channels_last if channels_last else torch.contiguous_format


def autocast(setting: Setting, precision: str) -> AbstractContextManager[Any]:
    """`precision`: fp32 and tf32 compute as they are, bf16 and fp16 under autocast."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        return nullcontext()
    return torch.autocast(torch.device(setting.device).type, dtype=dtypes[precision])


def on_gpu(setting: Setting) -> bool:
    return setting.device.startswith("cuda")


def synchronize(setting: Setting) -> None:
    import torch

    if on_gpu(setting):
        torch.cuda.synchronize()


def describe_device(setting: Setting) -> Figures:
    """What the GPU is; fails where another program holds much of its memory."""
    import torch
    from torch.cuda import nccl

    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    figures: Figures = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": total / GIB,
        "free_gib": free / GIB,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "driver": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl.version())) if torch.distributed.is_nccl_available() else None,
    }
    with suppress(Exception):
        figures["driver"] = read_gpus()[0].driver
    if free < FREE_MEMORY * total:
        raise CheckFailed(f"less than {FREE_MEMORY:.0%} of the GPU's memory is free: end the other program", figures)
    return figures


def compile_model(setting: Setting, model: nn.Module) -> nn.Module:
    import torch

    compiled: Any = torch.compile(model, backend=setting.compile_backend, dynamic=False)
    return compiled


def measure_transfer(setting: Setting) -> Figures:
    """GB/s of uint8 batches to the device, from pageable and from pinned memory."""
    import torch

    shape = (setting.batch, 3, setting.image_size, setting.image_size)
    pageable = torch.randint(0, 256, shape, dtype=torch.uint8)
    sources = {"pageable": pageable} | ({"pinned": pageable.pin_memory()} if on_gpu(setting) else {})
    target = torch.empty_like(pageable, device=setting.device)
    figures: Figures = {"batch_mb": pageable.nbytes / 1e6}
    for name, source in sources.items():
        target.zero_()
        figures[f"{name}_gb_per_s"] = _copy_gb_per_s(setting, source, target)
        if not torch.equal(target.cpu(), pageable):
            raise CheckFailed(f"bytes from {name} memory arrive changed", figures)
    if figures.get("pinned_gb_per_s", math.inf) < LEAST_GB_PER_S:
        raise CheckFailed(f"pinned copies are slower than {LEAST_GB_PER_S} GB/s", figures)
    return figures


def _copy_gb_per_s(setting: Setting, source: Tensor, target: Tensor, copies: int = 50) -> float:
    for _ in range(3):
        target.copy_(source, non_blocking=True)
    synchronize(setting)
    started = time.perf_counter()
    for _ in range(copies):
        target.copy_(source, non_blocking=True)
    synchronize(setting)
    return copies * source.nbytes / (time.perf_counter() - started) / 1e9


def reduce_alone(setting: Setting) -> Figures:
    """A process group of one rank, on NCCL where there is a GPU: seconds to form it and of an all-reduce of 64 MiB."""
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    backend, limit = ("nccl" if on_gpu(setting) else "gloo"), timedelta(seconds=40)
    started = time.perf_counter()
    store = TCPStore("127.0.0.1", 0, world_size=1, is_master=True, timeout=limit)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
    try:
        ones = torch.ones(16 << 20, device=setting.device)
        dist.all_reduce(ones)
        synchronize(setting)
        init_s = time.perf_counter() - started
        dist.all_reduce(ones)
        synchronize(setting)
        figures = {"backend": backend, "init_s": init_s, "all_reduce_s": time.perf_counter() - started - init_s}
        if not bool((ones == 1).all()):
            raise CheckFailed("the sum over one rank is not its own value", figures)
    finally:
        dist.destroy_process_group()
    return figures


def make_step(setting: Setting, model: nn.Module, batch: Batch, precision: str) -> Callable[[], Tensor]:
    """One training step on a fixed batch; returns the loss on the device, without waiting for it."""
    import torch

    images, labels = batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(setting, precision):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def time_steps(setting: Setting, step: Callable[[], Tensor], warmup: int = 4) -> list[float]:
    """Milliseconds of each step after a warm-up: as many as fit `measure_s`, 5 to 100."""
    for _ in range(warmup):
        step()
    synchronize(setting)
    started = time.perf_counter()
    step()
    synchronize(setting)
    count = min(100, max(5, int(setting.measure_s / (time.perf_counter() - started))))
    return _time_on_gpu(step, count) if on_gpu(setting) else _time_on_cpu(step, count)


def _time_on_gpu(step: Callable[[], Tensor], count: int) -> list[float]:
    """Marks in the device's own queue, so that no step waits for the host to look at the clock."""
    import torch

    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(marks)]


def _time_on_cpu(step: Callable[[], Tensor], count: int) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(count):
        step()
        marks.append(time.perf_counter())
    return [1e3 * (end - begin) for begin, end in pairwise(marks)]


def measure_step(
    setting: Setting,
    *,
    batch: int,
    precision: str,
    channels_last: bool = False,
    compiled: bool = False,
    must_fit: bool = False,
) -> Figures:
    """Time and peak memory of a training step; a batch that the GPU cannot hold is a figure unless it `must_fit`."""
    import torch

    set_arithmetic(tf32=precision != "fp32", benchmark=True)
    model = build_model(setting, channels_last=channels_last)
    try:
        if compiled:
            model = compile_model(setting, model)
        data = make_batch(setting, batch, channels_last=channels_last)
        return {"batch": batch, **_measure(setting, make_step(setting, model, data, precision), batch)}
    except torch.OutOfMemoryError as error:
        figures = {"batch": batch, "out_of_memory": True}
        if must_fit:
            raise CheckFailed(f"the smallest batch does not fit: {error}", figures) from error
        return figures


def _measure(setting: Setting, step: Callable[[], Tensor], batch: int) -> Figures:
    import torch

    started = time.perf_counter()
    step()
    synchronize(setting)
    first_step_s = time.perf_counter() - started
    if on_gpu(setting):
        torch.cuda.reset_peak_memory_stats()
    times = time_steps(setting, step)
    loss, middle = float(step()), median(times)
    figures: Figures = {
        "step_ms": middle,
        "step_p90_ms": quantiles(times, n=10, method="inclusive")[-1],
        "images_per_s": 1e3 * batch / middle,
        "steps": len(times),
        "first_step_s": first_step_s,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu(setting) else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu(setting) else None,
        "loss": loss,
    }
    if not math.isfinite(loss):
        raise CheckFailed("the loss is not finite", figures)
    return figures
