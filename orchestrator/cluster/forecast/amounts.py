"""Quantities as Kubernetes writes them, as exact numbers and as people read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

BYTES = ("memory", "storage")
ZERO = Decimal(0)
Amounts = Mapping[str, Decimal]


@lru_cache(maxsize=1 << 14)
def amount(text: str | int | float) -> Decimal:
    """`500m`, `1.5Gi`, `2e3`, 8 as a number."""
    from kubernetes.utils.quantity import parse_quantity

    return Decimal(parse_quantity(text))


def amounts(given: Mapping[str, Any] | None) -> dict[str, Decimal]:
    return {name: amount(value) for name, value in (given or {}).items()}


def total(parts: Iterable[Amounts]) -> dict[str, Decimal]:
    sums: Counter[str] = Counter()
    for part in parts:
        for name, value in part.items():
            sums[name] += value  # pyright: ignore[reportArgumentType]
    return dict(sums)  # pyright: ignore[reportReturnType]


def times(parts: Amounts, count: int) -> dict[str, Decimal]:
    return {name: value * count for name, value in parts.items()}


def told(name: str, value: Decimal) -> str:
    """`12 GiB`, `0.5`, `8`: in the unit that fits the resource."""
    if not any(name.endswith(kind) for kind in BYTES):
        return f"{float(value):.10g}"
    for unit, size in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if abs(value) >= 1 << size:
            return f"{float(value / (1 << size)):.4g} {unit}"
    return f"{value:.0f} B"


def short(name: str) -> str:
    """`nvidia.com/gpu` as people say it."""
    return "GPU" if name.endswith("/gpu") else name
