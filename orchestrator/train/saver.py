"""Saving beside training: a snapshot at the step's border, then one thread of the first rank that writes it."""

from __future__ import annotations

import io
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from orchestrator.config import CheckpointingConfig
from orchestrator.errors import CheckpointError
from orchestrator.train.fence import Fence
from orchestrator.train.process import Rank
from orchestrator.train.retention import prune
from orchestrator.train.state import TrainState, random_states
from orchestrator.train.writing import write_checkpoint

log = logging.getLogger(__name__)


class Mirror(Protocol):
    """A second place for sealed checkpoints, served beside the writing."""

    held: frozenset[str]
    """Names of folders that it is reading."""

    @property
    def error(self) -> CheckpointError | None:
        """A newer writer has taken it over."""
        ...

    def offer(self) -> None:
        """A checkpoint was sealed."""

    def finish(self, limit_s: float) -> None:
        """Wait until the last one offered is there. Raises TransientError where it cannot be brought there in time."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is durable."""

    step: int
    folder: Path
    write_s: float


class Snapshot:
    """A copy of a state on the CPU, whose memory the next one uses again."""

    def __init__(self):
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, state: TrainState) -> TrainState:
        """A copy that later steps do not change; it is valid until the next call."""
        copied = state.map(self._copy)
        if torch.cuda.is_initialized():  # copies from a GPU run beside this thread
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype, buffer.stride()) != (
            tensor.shape,
            tensor.dtype,
            tensor.stride(),
        ):
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)


class Saver:
    """Saves a run's checkpoints; `save` is called by all ranks together, and only the first one writes."""

    def __init__(self, settings: CheckpointingConfig, rank: Rank, fence: Fence | None, mirror: Mirror | None = None):
        """`fence` of the first rank."""
        self._settings, self._rank, self._fence, self._mirror = settings, rank, fence, mirror
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None

    def save(self, state: TrainState, manifest: dict[str, Any], told: Callable[[Saved], None]) -> None:
        """Return when later steps may change `state`; `told` hears, in the writer's thread, when it is durable.

        Raises what the writer of the save before met: NodeError on a full disk.
        """
        ranks = self._gather()
        if self._fence is None:
            return
        self._join()
        if not self._settings.asynchronous:
            self._write(state.map(lambda key, tensor: tensor.detach().cpu()), ranks, manifest, told)
            self.check()
            return
        self._idle.clear()
        self._work.put(partial(self._write, self._snapshot.take(state), ranks, manifest, told))
        if self._thread is None:
            # one for all saves: a thread that starts runs at once, for milliseconds that the next step would wait
            self._thread = threading.Thread(target=self._write_all, daemon=True, name="checkpoint writer")
            self._thread.start()

    def check(self) -> None:
        """Raise what the writer met since the last call, if anything."""
        error, self._error = self._error, None
        error = error or (self._mirror.error if self._mirror else None)
        if error is not None:
            raise error

    @property
    def is_writing(self) -> bool:
        return not self._idle.is_set()

    def wait(self, mirror_s: float) -> None:
        """Return when the last save is durable, here and in the mirror, which may take `mirror_s`.

        Raises what stood in the way.
        """
        self._join()
        if self._mirror is not None:
            self._mirror.finish(mirror_s)

    def settle(self) -> None:
        """Return on all ranks when no save is under way on the first one, whatever it met; collective."""
        self._idle.wait()
        if self._rank.control is not None:
            dist.barrier(group=self._rank.control)

    def close(self) -> None:
        """End without an error of its own: another one may be on its way."""
        self._idle.wait()
        self._work.put(None)
        if self._error is not None:
            log.warning("the last save failed: %s", self._error)
        if self._mirror is not None:
            self._mirror.close()
        if self._fence is not None:
            self._fence.release()

    def _join(self) -> None:
        self._idle.wait()
        self.check()

    def _gather(self) -> list[bytes]:
        """The small state of every rank, on the first one."""
        world, buffer = self._rank.world, io.BytesIO()
        torch.save(random_states(world.rank, world.world_size), buffer)
        if self._rank.control is None:
            return [buffer.getvalue()]
        gathered: list[Any] | None = [None] * world.world_size if world.is_first else None
        dist.gather_object(buffer.getvalue(), gathered, group=self._rank.control)
        return gathered or []

    def _write_all(self) -> None:
        while (write := self._work.get()) is not None:
            write()
            self._idle.set()

    def _write(
        self, state: TrainState, ranks: Iterable[bytes], manifest: dict[str, Any], told: Callable[[Saved], None]
    ) -> None:
        assert self._fence is not None
        began = time.perf_counter()
        try:
            folder = write_checkpoint(self._fence, state, ranks, manifest)
            told(Saved(manifest["step"], folder, time.perf_counter() - began))
            if self._mirror is not None:
                self._mirror.offer()
            prune(self._fence, self._settings, self._mirror.held if self._mirror else frozenset())
        except BaseException as error:  # raised in the thread that trains, at its next border
            self._error = error
