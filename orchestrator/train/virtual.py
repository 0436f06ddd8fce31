"""Virtual ranks: the arithmetic that makes the bits of a step the same for any number of processes. Pure.

A step's global batch is cut into V slices, V a power of two. Each of W processes, W dividing V, computes V / W
neighbouring slices one after another. Their gradients meet in the one binary tree over the V slices: partial sums of
equal height like carries in a counter within a process, then across processes by distance 1, 2, 4 ... Which two
numbers meet is fixed, and a sum of two does not depend on their order, so W leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from orchestrator.errors import ConfigError


def is_power_of_two(number: int) -> bool:
    return number > 0 and number.bit_count() == 1


def serves(virtual_ranks: int | None, world_size: int) -> bool:
    """Whether so many processes share the slices evenly and in whole branches of the tree; None: any number does."""
    return virtual_ranks is None or (is_power_of_two(world_size) and virtual_ranks % world_size == 0)


def serving_worlds(virtual_ranks: int) -> list[int]:
    """All numbers of processes that serve, rising."""
    return [1 << height for height in range(virtual_ranks.bit_length())]


def largest_world(virtual_ranks: int | None, low: int, high: int, places: int) -> int:
    """The most processes between `low` and `high` that have a place and serve; 0: none."""
    fitting = range(min(high, places), low - 1, -1)
    return next((size for size in fitting if serves(virtual_ranks, size)), 0)


def require_serves(virtual_ranks: int, low: int, high: int) -> None:
    """Refuse numbers of processes, `low` to `high`, of which none serves."""
    if largest_world(virtual_ranks, low, high, high):
        return
    worlds = [str(size) for size in serving_worlds(virtual_ranks)]
    asked = f"{low} to {high}" if low < high else f"{high}"
    rule = f"cuts a step into {virtual_ranks} slices, which {asked} processes cannot share evenly"
    listed = " or ".join([", ".join(worlds[:-1]), worlds[-1]] if len(worlds) > 1 else worlds)
    way_out = f"compute.num_processes={listed} (or a range with one of them), or compute.virtual_ranks=off"
    raise ConfigError("compute.virtual_ranks", virtual_ranks, rule, way_out)


def require_shareable(asked: str, reach: tuple[int, int] | None, processes: int) -> int:
    """The slices of a step of a run that starts with `processes`, or with as many of `reach` as serve."""
    if not asked.isdecimal():
        return processes
    require_serves(int(asked), *(reach or (processes, processes)))
    return int(asked)


class Choice(NamedTuple):
    """How an attempt adds gradients up."""

    virtual_ranks: int | None
    """None: a plain all-reduce."""
    notice: str | None = None
    """What a person should know about it."""


def choose(asked: str, recorded: Choice | None, world_size: int) -> Choice:
    """What `compute.virtual_ranks` = `asked` means for an attempt of a run that has recorded an earlier choice.

    Raises ConfigError where a number was asked for that the processes cannot share.
    """
    if asked == "off":
        return Choice(None)
    if asked != "auto":
        require_serves(int(asked), world_size, world_size)
        return Choice(int(asked))
    if recorded is None:
        return _first_choice(world_size)
    if serves(recorded.virtual_ranks, world_size):
        return Choice(recorded.virtual_ranks)
    return Choice(
        None,
        f"{world_size} processes cannot share the {recorded.virtual_ranks} slices that this run cuts its steps into: "
        f"from here on its last bits depend on the number of processes. They would not with "
        f"{' or '.join(map(str, serving_worlds(recorded.virtual_ranks or 1)))} processes",
    )


def _first_choice(world_size: int) -> Choice:
    if is_power_of_two(world_size):
        return Choice(world_size)
    return Choice(
        None,
        f"{world_size} processes are no power of two: the last bits of this run depend on the number of processes "
        "(compute.virtual_ranks=8, say, with 1, 2, 4 or 8 processes would make them the same)",
    )


T = TypeVar("T")
Partial = tuple[int, T]
"""A height h and the sum of 2 ** h neighbouring slices."""


def carry(waiting: list[Partial[T]], new: T, add: Callable[[T, T], T]) -> None:
    """Add the next slice to the partial sums that wait for their equals; their heights fall from first to last."""
    height = 0
    while waiting and waiting[-1][0] == height:
        new = add(waiting.pop()[1], new)
        height += 1
    waiting.append((height, new))


class Level(NamedTuple):
    """A meeting of two processes on the way up the tree: they swap halves, and each adds one of them up."""

    peer: int
    kept: slice
    sent: slice


def levels(count: int, rank: int, world_size: int) -> list[Level]:
    """By whom and for which of `count` numbers a process is met, from distance 1 up.

    All numbers are added up after the last level, each by one process. The way back down, from the last level to the
    first, sends `kept` and receives `sent`: up and down take 2 x (1 - 1 / world_size) of the bytes, as a ring does.
    """
    found, low, high = [], 0, count
    for height in range(world_size.bit_length() - 1):
        middle = (low + high) // 2
        halves = slice(low, middle), slice(middle, high)
        upper = rank >> height & 1
        found.append(Level(rank ^ (1 << height), halves[upper], halves[1 - upper]))
        low, high = halves[upper].start, halves[upper].stop
    return found
