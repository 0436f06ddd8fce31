"""The logs of all pods of a run while they come and go: a thread for each pod, one that finds them, one queue."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

from orchestrator.cluster.backend import LogLine
from orchestrator.cluster.kubernetes.api import Api, Object, Stream
from orchestrator.cluster.kubernetes.failures import Gone
from orchestrator.cluster.kubernetes.logs import PATIENCE_S, PAUSE_S, Joiner, PodLog, attempt_of, read_ended
from orchestrator.cluster.kubernetes.pods import has_log, is_active
from orchestrator.cluster.kubernetes.resources import POD
from orchestrator.errors import TransientError

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks at the run while no pod has a log to follow."""
AHEAD = 10_000
"""Lines that may wait for the reader."""
Arrived = tuple[int, str] | Exception


class Follower:
    """Follows the pods with certain labels until the run has ended."""

    def __init__(self, api: Api, labels: str, joiner: Joiner):
        self._api = api
        self._labels = labels
        self._joiner = joiner
        self._arrived: queue.Queue[Arrived] = queue.Queue(AHEAD)
        self._known: set[str] = set()
        self._logs: list[PodLog] = []
        self._threads: list[threading.Thread] = []
        self._watch: Stream | None = None
        self._closed = threading.Event()

    def lines(self, is_over: Callable[[], bool]) -> Iterator[LogLine]:
        """Those of ended pods first, then what the living ones say, as it comes. `is_over`: whether the run has ended.

        Raises what a thread met.
        """
        pods, version = self._api.list(POD, self._labels)
        ended = [pod for pod in pods if not is_active(pod)]
        self._known |= {pod["metadata"]["uid"] for pod in ended}
        yield from read_ended(self._api, ended, self._joiner)
        finder = threading.Thread(target=self._reporting, args=(self._find, pods, version), daemon=True)
        finder.start()
        try:
            yield from self._joined(is_over)
        finally:
            self.close()
            finder.join(PAUSE_S)

    def close(self) -> None:
        """End all threads."""
        self._closed.set()
        for one in [self._watch, *self._logs]:
            if one is not None:
                one.close()

    def _joined(self, is_over: Callable[[], bool]) -> Iterator[LogLine]:
        looked = time.monotonic()
        while True:
            try:
                yield from self._taken(self._arrived.get(timeout=LOOK_S / 4))
            except queue.Empty:
                if time.monotonic() - looked < LOOK_S or any(thread.is_alive() for thread in self._threads):
                    continue
                looked = time.monotonic()
                if is_over():
                    yield from self._rest()
                    return

    def _taken(self, arrived: Arrived) -> Iterator[LogLine]:
        if isinstance(arrived, Exception):
            raise arrived
        line = self._joiner.take(arrived[1], arrived[0])
        if line is not None:
            yield line

    def _rest(self) -> Iterator[LogLine]:
        """What came while the end was looked for, and the pods that the watch had not told of yet."""
        for pod in self._api.list(POD, self._labels)[0]:
            self._meet(pod)
        while any(thread.is_alive() for thread in self._threads) or not self._arrived.empty():
            try:
                yield from self._taken(self._arrived.get(timeout=0.05))
            except queue.Empty:
                continue

    def _find(self, pods: list[Object], version: str) -> None:
        """Meet each pod that has a log, now and as they come. Raises TransientError after patience."""
        since = time.monotonic()
        while not self._closed.is_set():
            try:
                for pod in pods:
                    self._meet(pod)
                pods = []
                for newest in self._changes(version):
                    version, since = newest, time.monotonic()
            except Gone:
                pods, version = self._api.list(POD, self._labels)
            except TransientError as error:
                if time.monotonic() - since > PATIENCE_S:
                    raise
                logger.info("pods of the run: %s; trying again", error)
                self._closed.wait(PAUSE_S)

    def _changes(self, version: str) -> Iterator[str]:
        """Meet the pods of one watch; yields the version that each change leads to."""
        self._watch = self._api.watch(POD, self._labels, version)
        if self._closed.is_set():  # while it was opened
            self._watch.close()
        for line in self._watch:
            kind, pod = self._api.read_event(line)
            if kind in ("ADDED", "MODIFIED"):
                self._meet(pod)
            yield pod["metadata"]["resourceVersion"]

    def _meet(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if uid in self._known or not has_log(pod):
            return
        self._known.add(uid)
        log = PodLog(self._api, pod)
        thread = threading.Thread(target=self._reporting, args=(self._follow, log), daemon=True)
        self._logs.append(log)
        if self._closed.is_set():
            log.close()
        self._threads.append(thread)
        thread.start()

    def _follow(self, log: PodLog) -> None:
        attempt = 0
        for _, text in log.follow():
            attempt = attempt_of(text, attempt)
            self._put((attempt, text))

    def _put(self, arrived: Arrived) -> None:
        while not self._closed.is_set():
            try:
                self._arrived.put(arrived, timeout=PAUSE_S)
                return
            except queue.Full:
                continue

    def _reporting(self, work: Callable[..., None], *args: object) -> None:
        """Run in a thread; what ends it is raised where the lines are read."""
        try:
            work(*args)
        except Exception as error:  # whatever it is: a thread that ends in silence would leave the reader waiting
            self._put(error)
