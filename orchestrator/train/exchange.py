"""The tree of `virtual.py` across processes, as DDP's communication hook: exchanges run beside the backward pass.

On the CPU a thread with a group of its own talks to the peers; on GPUs a stream of its own does (written after NCCL's
rules, and never run on more than one GPU).
"""

import queue
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.futures import Future

from orchestrator.train.virtual import levels

Prepare = Callable[[list[torch.Tensor], list[torch.Tensor]], None]
"""Adds what waits in this process to the gradients (second) of parameters (first), in place."""


class TreeExchange:
    """Sums buckets of gradients over all processes, always in the order of the tree."""

    def __init__(self, group: dist.ProcessGroup, prepare: Prepare):
        """`group`: all processes, used for nothing else."""
        self._group, self._prepare = group, prepare
        self._rank, self._world_size = group.rank(), group.size()
        self.bytes_sent = 0
        self.busy_s = 0.0
        """On the CPU: how long buckets were under way, overlapped with backward or not."""
        self._spare: dict[torch.dtype, torch.Tensor] = {}
        self._error: Exception | None = None
        self._buckets: queue.SimpleQueue[tuple[torch.Tensor, Future[torch.Tensor]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None

    def hook(self, bucket: GradBucket) -> Future[torch.Tensor]:
        """What DDP calls when the gradients of a bucket are there."""
        self._prepare(bucket.parameters(), bucket.gradients())
        buffer = bucket.buffer()
        if buffer.device.type == "cuda":
            return self._beside(buffer)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="gradients")
            self._thread.start()
        future: Future[torch.Tensor] = Future()
        self._buckets.put((buffer, future))
        return future

    def require_whole(self) -> None:
        """Raise what an exchange met; DDP itself would not understand it."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        while True:
            buffer, future = self._buckets.get()
            began = time.perf_counter()
            if self._error is None:
                try:
                    self.sum(buffer)
                except Exception as error:
                    self._error = error
            self.busy_s += time.perf_counter() - began
            future.set_result(buffer)

    def _beside(self, buffer: torch.Tensor) -> Future[torch.Tensor]:
        self._stream = self._stream or torch.cuda.Stream(buffer.device)
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        future: Future[torch.Tensor] = Future(devices=[buffer.device])
        with torch.cuda.stream(self._stream):
            self.sum(buffer)
            future.set_result(buffer)
        return future

    def sum(self, numbers: torch.Tensor) -> None:
        """Replace flat numbers by their sum over all processes."""
        if self._world_size == 2:  # a sum of two has one order only
            self.bytes_sent += numbers.nbytes
            dist.all_reduce(numbers, group=self._group)
            return
        way = levels(len(numbers), self._rank, self._world_size)
        for peer, kept, sent in way:
            received = self._room_for(numbers[kept])
            self._swap(peer, numbers[sent], received)
            numbers[kept] += received
        for peer, kept, sent in reversed(way):
            self._swap(peer, numbers[kept], numbers[sent])

    def _swap(self, peer: int, sent: torch.Tensor, received: torch.Tensor) -> None:
        self.bytes_sent += sent.nbytes
        swaps = [(dist.isend, sent), (dist.irecv, received)]
        swaps = [dist.P2POp(how, part, peer, self._group) for how, part in swaps if len(part)]
        for under_way in dist.batch_isend_irecv(swaps) if swaps else ():
            under_way.wait()

    def _room_for(self, part: torch.Tensor) -> torch.Tensor:
        spare = self._spare.get(part.dtype)
        if spare is None or len(spare) < len(part):
            spare = self._spare[part.dtype] = torch.empty_like(part)
        return spare[: len(part)]


def tree_hook(exchange: TreeExchange, bucket: GradBucket) -> Future[torch.Tensor]:
    """`TreeExchange.hook` in the form that DDP registers; DDP reads these annotations, so they must not be strings."""
    return exchange.hook(bucket)
