"""The checks of `make gpu-check`: each takes a `Setting`, returns figures, and raises `CheckFailed` on a wrong result.

Each runs in a process of its own and leaves global switches as it set them.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from orchestrator.gpu_check import CheckFailed, Setting

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
TOLERANCE = {"bf16": (0.03, 0.95), "fp16": (0.01, 0.98), "fp32": (1e-3, 0.999)}
"""Greatest relative L2 error of the logits, and least cosine of the whole gradient, against fp32 without TF32."""
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
    for name, weight in model.named_parameters():
        if name.endswith("bn3.weight") or (name.endswith("bn2.weight") and name.replace("bn2", "bn3") not in dict(model.named_parameters())):
            torch.nn.init.constant_(weight, BRANCH_GAIN)
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
