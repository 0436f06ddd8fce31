"""Whether all ranks hold the same weights: an exact hash of raw bits on each rank, compared across all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from orchestrator.errors import DeviceError, NodeError
from orchestrator.train.process import Rank

CPU_CHUNK, GPU_CHUNK = 1 << 15, 1 << 24
"""Words that are hashed at once: what stays in a core's cache, and few launches on a GPU."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Ranks whose tensors are not those of the others."""

    ranks: tuple[int, ...]
    """The minority; all of them where no bits are held by more than half."""
    tensors: tuple[str, ...]
    """Which differ, in the order of the model."""


class RankCheck:
    """Compares the ranks every so many steps, and whenever a checkpoint is about to be written."""

    def __init__(self, every_steps: int, rank: Rank, settle: Callable[[], None]):
        """`every_steps`: 0 never compares. `settle` lets a save end that is under way; collective."""
        self._every, self._rank, self._settle = every_steps, rank, settle
        self._equal_at: int | None = None

    def due(self, step: int, saves: bool) -> bool:
        return bool(self._every and self._rank.control is not None and (saves or step % self._every == 0))

    def require_equal(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Raise NodeError on all ranks where one holds other bits, DeviceError on that one; collective."""
        hashes = torch.stack([hash_bits(tensor) for tensor in tensors.values()]).cpu()
        table = [row.tolist() for row in self._rank.all_gather(hashes)]
        found = find_divergence(table, list(tensors))
        if found is None:
            self._equal_at = step
            return
        self._settle()
        self._rank.speak_after(found.ranks)
        is_suspect = self._rank.world.rank in found.ranks
        kind = DeviceError if is_suspect and len(found.ranks) < len(table) else NodeError
        raise kind(describe(found, len(table), step, self._equal_at))


def replicated_tensors(net: nn.Module, ema: nn.Module | None, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Everything that must be the same on every rank, by name; BatchNorm's buffers are each rank's own."""
    named = dict(net.named_parameters())
    tensors: dict[str, torch.Tensor] = dict(named)
    for name, parameter in named.items():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{key} of {name}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if ema is not None:
        tensors |= {f"average of {name.removeprefix('module.')}": value for name, value in ema.named_parameters()}
    return tensors


@torch.no_grad()
def hash_bits(tensor: torch.Tensor) -> torch.Tensor:
    """() int64 on the device: the bits as 64-bit words, each times an odd number of its place, summed mod 2^64.

    An odd factor has an inverse, so that one changed word always changes the sum.
    """
    raw = _in_memory_order(tensor).view(torch.uint8)
    whole = len(raw) // 8 * 8
    rest = torch.cat([raw[whole:], raw.new_zeros(8 - len(raw) + whole)]).view(torch.int64)
    total = rest[0] * (whole // 4 + 1)
    size = CPU_CHUNK if tensor.device.type == "cpu" else GPU_CHUNK
    odd = torch.arange(1, 2 * min(size, max(1, whole // 8)), 2, device=tensor.device)
    for number, words in enumerate(raw[:whole].view(torch.int64).split(size)):
        total = total + (2 * number + 1) * _dot(words, odd[: len(words)])
    return total


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """(n,) of a tensor's elements as they lie in memory, at an address that 64-bit words may have."""
    flat = tensor.detach()
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        flat = flat.permute(0, 2, 3, 1)
    flat = flat.reshape(-1).contiguous()
    return flat.clone() if flat.storage_offset() * flat.element_size() % 8 else flat


def _dot(words: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    if words.device.type == "cpu":  # in whole numbers torch.dot exists on the CPU alone; it is four times as fast there
        return torch.dot(words, factors)
    return (words * factors).sum()


def find_divergence(table: Sequence[Sequence[int]], names: Sequence[str]) -> Divergence | None:
    """Who differs from the majority and in what. `table`: (ranks, tensors) hashes."""
    rows = [tuple(row) for row in table]
    (common, votes), *_ = Counter(rows).most_common()
    if votes == len(rows):
        return None
    clear = 2 * votes > len(rows)
    ranks = tuple(rank for rank, row in enumerate(rows) if not clear or row != common)
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return Divergence(ranks, tuple(name for name, column in columns if len(set(column)) > 1))


def describe(found: Divergence, world_size: int, step: int, equal_at: int | None) -> str:
    """What happened, to whom, since when, and the way out."""
    who = ", ".join(str(rank) for rank in found.ranks)
    one, others = len(found.ranks) == 1, world_size - len(found.ranks)
    subject = f"rank {who} holds" if one else f"ranks {who} hold"
    against = f"other weights than the other {others} ranks" if others else "different weights"
    since = f"equal at step {equal_at}" if equal_at is not None else "not compared before by this attempt"
    return (
        f"{subject} {against} at step {step} ({since}): {found.tensors[0]} differs first, {len(found.tensors)} tensors "
        "in all. Nothing of it was saved. Way out: the run goes on from its last checkpoint; if it comes back on the "
        "same node, that node computes wrongly, and if on others, something changes weights on one rank alone"
    )
