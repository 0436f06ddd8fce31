"""Memory for batches, allocated once and shared by the loader processes that fill it and the rank that reads it.

A fresh shared tensor costs a page fault for every 4 KiB of every batch; a slot that is used again costs nothing.
No lock is needed: DataLoader lets a worker run at most `prefetch` batches ahead of what the rank has taken, so a ring
of `prefetch + 2` slots returns to a slot only after the rank took two later batches of that worker.
"""

from __future__ import annotations

import mmap

import numpy as np
import torch

SPARE = 2


class Ring:
    """Slots of equal size for each loader process; picklable where it is made for processes that are not forked."""

    def __init__(self, workers: int, prefetch: int, slot_bytes: int, forked: bool):
        self._depth = prefetch + SPARE
        shape = max(1, workers), self._depth, slot_bytes
        if forked:  # anonymous memory: no limit of /dev/shm, gone with the last process
            memory = mmap.mmap(-1, max(1, shape[0] * shape[1] * shape[2]))
            self.memory = torch.frombuffer(memory, dtype=torch.uint8)[: np.prod(shape)].view(shape)
        else:
            self.memory = torch.empty(shape, dtype=torch.uint8).share_memory_()
        self._filled = 0

    def next_slot(self) -> int:
        """The slot that a worker fills next."""
        self._filled += 1
        return (self._filled - 1) % self._depth

    def images(self, worker: int, slot: int, rows: int, size: int) -> torch.Tensor:
        """The slot as images, (rows, 3, size, size) uint8."""
        return self.memory[worker, slot, : rows * 3 * size * size].view(rows, 3, size, size)
