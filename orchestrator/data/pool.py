"""Packing processes: one shard each at a time, started afresh (spawn), gone when the command is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from orchestrator.data.pack import ShardFacts, ShardTask, pack_shard
from orchestrator.errors import NodeError

POLL_S = 0.2
WORTH_A_PROCESS = 4000
"""Packing this many small images takes as long as starting a process does."""
BYTES_OF_A_SMALL_IMAGE = 16 << 10

_shared: dict[str, Any] = {}


def choose_workers(tasks: list[ShardTask]) -> int:
    """One per core, fewer where the work is small."""
    sizes = [item.size for task in tasks for _, item in task.samples]
    work = len(sizes) + sum(sizes) // BYTES_OF_A_SMALL_IMAGE
    return max(1, min(len(os.sched_getaffinity(0)), work // WORTH_A_PROCESS))


def pack_all(tasks: list[ShardTask], workers: int | None, advance: Callable[[int], None]) -> list[ShardFacts]:
    """Pack every task; facts come in the order of the tasks.

    Raises OSError of the disk, NodeError where a packing process dies.
    """
    workers = min(workers or choose_workers(tasks), len(tasks))
    if workers <= 1:
        return [pack_shard(task, lambda: advance(1), lambda: False) for task in tasks]
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start, (done, stop)) as pool:
        futures = [pool.submit(_pack, task) for task in tasks]
        try:
            _wait(futures, done, advance)
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise NodeError("a packing process died, perhaps of memory. Way out: fewer --workers") from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _wait(futures: list[Future[ShardFacts]], done: Any, advance: Callable[[int], None]) -> None:
    """Report progress until all are done or one failed."""
    shown, pending = 0, set(futures)
    while pending:
        finished, pending = wait(pending, timeout=POLL_S)
        for future in finished:
            future.result()
        advance(done.value - shown)
        shown = done.value


def _start(done: Any, stop: Any) -> None:
    """In a packing process: the parent handles Ctrl-C, and its death ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shared.update(done=done, stop=stop)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _pack(task: ShardTask) -> ShardFacts:
    return pack_shard(task, _tick, _shared["stop"].is_set)


def _tick() -> None:
    with _shared["done"].get_lock():
        _shared["done"].value += 1
