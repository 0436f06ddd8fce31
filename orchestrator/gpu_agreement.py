"""The comparing checks of `make gpu-check`: two ways of computing the same must agree, see `gpu_bench` for the rest."""

from __future__ import annotations

import hashlib
import os
import time
from statistics import median
from typing import TYPE_CHECKING

from orchestrator.gpu_bench import (
    Batch,
    Figures,
    autocast,
    build_model,
    compile_model,
    make_batch,
    make_step,
    set_arithmetic,
    synchronize,
    time_steps,
)
from orchestrator.gpu_check import CheckFailed, Setting

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = {"bf16": (0.03, 0.95), "fp16": (0.01, 0.98), "fp32": (1e-3, 0.999)}
"""Greatest relative L2 error of the logits, and least cosine of the whole gradient, against fp32 without TF32."""


def forward_backward(setting: Setting, model: nn.Module, batch: Batch, precision: str) -> tuple[Tensor, Tensor]:
    """Logits  # (B, classes) and the whole gradient  # (parameters,), both fp32; fp16 goes through the loss scaler."""
    import torch

    images, labels = batch
    scaler = torch.amp.GradScaler(torch.device(setting.device).type, enabled=precision == "fp16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(16):
        optimizer.zero_grad()
        with autocast(setting, precision):
            logits = model(images)
            loss = torch.nn.functional.cross_entropy(logits, labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradient = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
        # An overflow is not an error of fp16: the scaler answers it with half the scale.
        scaler.step(optimizer)
        scaler.update()
        if bool(gradient.isfinite().all()):
            return logits.detach().float(), gradient
    raise CheckFailed("no finite gradient at any loss scale", {"scale": scaler.get_scale()})


def require_agreement(reference: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], precision: str) -> Figures:
    """Errors of `other` against `reference` (logits, gradient); raises beyond the tolerance of `precision`."""
    (logits, gradient), (other_logits, other_gradient) = reference, other
    most, least = TOLERANCE[precision]
    a, b = gradient.double(), other_gradient.double()
    figures = {
        "logits_error": float((other_logits - logits).norm() / logits.norm()),
        "logits_tolerance": most,
        "gradient_cosine": float(a.dot(b) / (a.norm() * b.norm())),
        "gradient_cosine_least": least,
    }
    if not (figures["logits_error"] <= most and figures["gradient_cosine"] >= least):
        raise CheckFailed("the two results differ by more than the tolerance", figures)
    return figures


def compare_precision(setting: Setting, *, precision: str) -> Figures:
    """Forward and backward under autocast against fp32."""
    set_arithmetic()
    batch = make_batch(setting, setting.agree_batch)
    reference = forward_backward(setting, build_model(setting), batch, "fp32")
    return require_agreement(reference, forward_backward(setting, build_model(setting), batch, precision), precision)


def compare_channels_last(setting: Setting) -> Figures:
    """The same result in both memory layouts in fp32, and the speed of both in bf16."""
    set_arithmetic()
    results, times = [], []
    for channels_last in (False, True):
        batch = make_batch(setting, setting.agree_batch, channels_last=channels_last)
        results.append(forward_backward(setting, build_model(setting, channels_last=channels_last), batch, "fp32"))
    set_arithmetic(benchmark=True)
    for channels_last in (False, True):
        model = build_model(setting, channels_last=channels_last)
        step = make_step(setting, model, make_batch(setting, setting.batch, channels_last=channels_last), "bf16")
        times.append(median(time_steps(setting, step)))
    figures = require_agreement(results[0], results[1], "fp32")
    return figures | {"contiguous_ms": times[0], "channels_last_ms": times[1], "speed_up": times[0] / times[1]}


def compare_compiled(setting: Setting) -> Figures:
    """torch.compile against eager in fp32: the same result, the speed of both, and the seconds of compiling."""

    set_arithmetic()
    batch = make_batch(setting, setting.agree_batch)
    eager = build_model(setting)
    compiled = compile_model(setting, build_model(setting))
    reference = forward_backward(setting, eager, batch, "fp32")
    started = time.perf_counter()
    other = forward_backward(setting, compiled, batch, "fp32")
    synchronize(setting)
    compile_s = time.perf_counter() - started
    figures = require_agreement(reference, other, "fp32") | {"compile_s": compile_s}
    eager_ms, compiled_ms = (
        median(time_steps(setting, make_step(setting, model, batch, "fp32"))) for model in (eager, compiled)
    )
    return figures | {"eager_ms": eager_ms, "compiled_ms": compiled_ms, "speed_up": eager_ms / compiled_ms}


def repeat_steps(setting: Setting, *, precision: str) -> Figures:
    """Two seeded optimizer steps, done twice with deterministic algorithms, leave the same bits in every weight."""
    # cuBLAS reads this when its first handle is made, so it must stand before any matrix product.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    set_arithmetic(deterministic=True)
    first, second = (_digest_after_steps(setting, precision) for _ in range(2))
    figures = {"first_sha256": first, "second_sha256": second}
    if first != second:
        raise CheckFailed("the same seed gave other bits", figures)
    return figures


def _digest_after_steps(setting: Setting, precision: str) -> str:
    model = build_model(setting)
    step = make_step(setting, model, make_batch(setting, setting.agree_batch), precision)
    step()
    step()
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def reuse_ring(setting: Setting, batches: int = 64) -> Figures:
    """Batches that travel through the loader's pinned ring arrive whole although each slot is filled many times."""
    import numpy as np
    import torch

    from orchestrator.data.ring import Ring
    from orchestrator.data.stream import Filled, Transfer

    rows, side = setting.batch, setting.image_size
    ring = Ring(1, 2, rows * 3 * side * side, forked=True)
    labels, arrived = np.zeros(rows, np.int64), []
    began = time.perf_counter()
    with Transfer(ring, torch.device(setting.device)) as transfer:
        for number in range(batches):
            transfer.wait_for_older()
            slot = ring.next_slot()
            ring.images(0, slot, rows, side).fill_(number % 251)
            batch = transfer.take(Filled(0, slot, side, labels, labels, rows, 0))
            arrived.append(batch.images.float().aminmax())
    seconds = time.perf_counter() - began
    wrong = [i for i, extremes in enumerate(arrived) if (int(extremes[0]), int(extremes[1])) != (i % 251,) * 2]
    figures: Figures = {"gib_per_s": batches * rows * 3 * side * side / seconds / 2**30, "wrong": len(wrong)}
    if wrong:
        raise CheckFailed(f"batches {wrong[:5]} were overwritten before they were copied", figures)
    return figures
