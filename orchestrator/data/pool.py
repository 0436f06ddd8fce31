"""Packing processes: one shard each at a time, started afresh (spawn), gone when the command is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from orchestrator.data.pack import ShardFacts, ShardTask, pack_shard
from orchestrator.errors import NodeError

POLL_S = 0.2
WORTH_A_PROCESS = 4000
"""Packing this many small images takes as long as starting a process does."""
BYTES_OF_A_SMALL_IMAGE = 16 << 10

_shared: dict[str, Any] = {}

Task = TypeVar("Task")
Facts = TypeVar("Facts")


def choose_workers(images: int, size: int) -> int:
    """One per core, fewer where the work is small: `images` of `size` bytes together."""
    work = images + size // BYTES_OF_A_SMALL_IMAGE
    return max(1, min(len(os.sched_getaffinity(0)), work // WORTH_A_PROCESS))


def pack_all(tasks: list[ShardTask], workers: int | None, advance: Callable[[int], None]) -> list[ShardFacts]:
    """Pack every task; raises what `run_all` raises."""
    sizes = [item.size for task in tasks for _, item in task.samples]
    return run_all(pack_shard, tasks, workers or choose_workers(len(sizes), sum(sizes)), advance)


def run_all(
    work: Callable[[Task, Callable[[], None], Callable[[], bool]], Facts],
    tasks: list[Task],
    workers: int,
    advance: Callable[[int], None],
) -> list[Facts]:
    """Do `work(task, tick, stopped)` for every task; facts come in the order of the tasks.

    Raises what `work` raises, NodeError where a packing process dies.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        return [work(task, lambda: advance(1), lambda: False) for task in tasks]
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start, (done, stop)) as pool:
        futures = [pool.submit(_work, work, task) for task in tasks]
        try:
            _wait(futures, done, advance)
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise NodeError("a packing process died, perhaps of memory. Way out: fewer --workers") from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _wait(futures: list[Future[Any]], done: Any, advance: Callable[[int], None]) -> None:
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


def _work(work: Callable[..., Facts], task: Any) -> Facts:
    return work(task, _tick, _shared["stop"].is_set)


def _tick() -> None:
    with _shared["done"].get_lock():
        _shared["done"].value += 1
