"""Where this project's loader is not ahead, in sentences made of the figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.bench.loaders.catalogue import LIMIT, LOADERS, REFERENCE


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the page's tables."""

    title: str
    place: tuple[str, ...]
    """Keys that lead to its figure; NAME stands for the loader."""
    is_cost: bool = False
    """Less is better."""

    def of(self, result: dict[str, Any], name: str) -> float | None:
        found: Any = result
        for key in self.place:
            found = found.get(name if key == NAME else key) if isinstance(found, dict) else None
        return found if isinstance(found, int | float) else None


NAME = "NAME"
SPEED = Column("images/s per core", ("loaders", NAME, "1", "images_per_cpu_s"))
COLUMNS = (
    SPEED,
    Column("images/s with two workers", ("loaders", NAME, "2", "images_per_s")),
    Column("seconds to the first batch", ("loaders", NAME, "1", "first_batch_s"), is_cost=True),
    Column("MiB with one worker", ("loaders", NAME, "1", "memory_mib_per_worker"), is_cost=True),
    Column("MiB per worker with two", ("loaders", NAME, "2", "memory_mib_per_worker"), is_cost=True),
    Column("seconds to a fresh epoch's first batch", ("resume", NAME, "fresh_s"), is_cost=True),
    Column("seconds to a resumed epoch's first batch", ("resume", NAME, "midway_s"), is_cost=True),
    Column("images/s from S3, cold", ("remote", NAME, "cold_images_per_s")),
    Column("images/s from S3, cached", ("remote", NAME, "warm_images_per_s")),
    Column("seconds to the first batch from S3, cold", ("remote", NAME, "cold_first_batch_s"), is_cost=True),
    Column("seconds to the first batch from S3, cached", ("remote", NAME, "warm_first_batch_s"), is_cost=True),
)
PEERS = tuple(name for name, loader in LOADERS.items() if not loader.is_ours and name != LIMIT)
PAIRS = (
    (REFERENCE, PEERS, COLUMNS),
    ("ours_plain", (*PEERS, LIMIT), (SPEED,)),
    ("ours_half", ("ffcv_rn50",), (SPEED,)),
    ("ours_wheels_plain", PEERS, (SPEED,)),
)
"""One of ours, whom it is compared with, and in what."""


def sentences(result: dict[str, Any]) -> list[str]:
    """One for each of ours and column in which others are ahead; peers without a figure are passed over."""
    return [
        f"{LOADERS[ours].title}, {column.title}: {'; '.join(ahead)}."
        for ours, others, columns in PAIRS
        for column in columns
        if (ahead := list(_ahead(result, column, ours, others)))
    ]


def _ahead(result: dict[str, Any], column: Column, ours: str, others: tuple[str, ...]) -> Iterator[str]:
    mine = column.of(result, ours)
    figures = {name: figure for name in others if (figure := column.of(result, name)) is not None}
    if mine is None:
        return
    for name in sorted(figures, key=lambda name: figures[name], reverse=not column.is_cost):
        theirs = figures[name]
        if theirs < mine if column.is_cost else theirs > mine:
            close = " (the rounds' ranges overlap)" if column is SPEED and _overlap(result, ours, name) else ""
            yield f"{LOADERS[name].title} has {theirs:,} against {mine:,}{close}"


def _overlap(result: dict[str, Any], one: str, other: str) -> bool:
    (low, high), (lowest, highest) = (
        result["loaders"][name]["1"]["images_per_cpu_s_range"] for name in (one, other)
    )  # fmt: skip
    return low <= highest and lowest <= high
