"""The fused step beside torchvision's transforms one after the other, on the CPU: python -m tests.bench.mixing.

Both take the same uint8 batch to mixed, erased, normalised floats; they alternate, and medians are compared. Prints
microseconds per image.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torchvision.transforms import v2

from orchestrator.compose import compose
from orchestrator.model.mixing import Mixing

BATCH, SIDE, ROUNDS, CLASSES = 64, 224, 21, 1000
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def naive(kind: str) -> Callable[[torch.Tensor, torch.Tensor, int], object]:
    mix = v2.MixUp(alpha=0.2, num_classes=CLASSES) if kind == "mixup" else v2.CutMix(alpha=1.0, num_classes=CLASSES)
    one = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.RandomErasing(p=0.1)])
    return lambda images, labels, step: mix(torch.stack([one(image) for image in images]), labels)


def fused(kind: str) -> Callable[[torch.Tensor, torch.Tensor, int], object]:
    alpha = {"mixup": 0.2, "cutmix": 1.0}[kind]
    mixing = Mixing(compose([f"recipe.{kind}={alpha}", "recipe.erase=0.1", "data=imagenet"]).config)
    return lambda images, labels, step: mixing(images, labels, torch.arange(len(images)), step, 0)


def main() -> None:
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (BATCH,))
    for kind in ("mixup", "cutmix"):
        ways, seconds = {"fused": fused(kind), "torchvision": naive(kind)}, {"fused": [], "torchvision": []}
        for step in range(ROUNDS):
            for name, way in ways.items():
                began = time.perf_counter()
                way(images, labels, step)
                seconds[name].append(time.perf_counter() - began)
        ratios = [theirs / ours for ours, theirs in zip(seconds["fused"], seconds["torchvision"], strict=True)]
        costs = "  ".join(f"{name} {median(spent) / BATCH * 1e6:.0f} µs" for name, spent in seconds.items())
        print(f"{kind}: {costs}  paired ratio {median(ratios):.2f}")


if __name__ == "__main__":
    main()
