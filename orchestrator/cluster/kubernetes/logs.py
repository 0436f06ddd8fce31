"""The log of each pod, line by line and each line once, whatever becomes of connections; and of all pods, joined."""

from __future__ import annotations

import heapq
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from orchestrator.cluster.backend import LogLine
from orchestrator.cluster.kubernetes.api import Api, Object, Stream
from orchestrator.cluster.kubernetes.failures import Busy, NotFound, Refused
from orchestrator.cluster.kubernetes.pods import container_of, failed_setup, has_log, is_active
from orchestrator.cluster.kubernetes.resources import POD
from orchestrator.cluster.lines import Said, parse, source
from orchestrator.errors import TransientError

logger = logging.getLogger(__name__)

PATIENCE_S = 600.0
"""How long a server may be away in the middle of a log."""
PAUSE_S = 0.5
SILENCE_S = 60.0
"""A followed log that is silent for so long is asked for again: nothing tells a quiet rank from a dead connection."""
STAMP = re.compile(r"(?P<second>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.(?P<fraction>\d+))?(?P<zone>Z|[+-]\d\d:\d\d) ?")
Stamped = tuple[str, str]
"""When the node took a line down, in a form that sorts, and the line."""


class PodLog:
    """The log of one container. `close`, from another thread, ends it."""

    def __init__(self, api: Api, pod: Object, since: str = ""):
        """`since`: from when on, in RFC 3339."""
        self._api = api
        self._name = str(pod["metadata"]["name"])
        self._uid = str(pod["metadata"].get("uid"))
        self._container = failed_setup(pod) or container_of(pod)
        self._recent = Recent(since)
        self._closed = threading.Event()
        self._stream: Stream | None = None

    def read(self) -> Iterator[Stamped]:
        """What is there now; where the pod's node does not answer, that is said and nothing comes."""
        try:
            yield from self._once(follow=False)
        except NotFound:
            return
        except Busy as error:
            logger.warning("log of %s: %s", self._name, error)

    def follow(self) -> Iterator[Stamped]:
        """Until the container has ended and all is read, or the pod is gone. Raises TransientError after patience."""
        silent_since = time.monotonic()
        while not self._closed.is_set():
            try:
                ended = self._has_ended()
                for stamped in self._once(follow=not ended):
                    silent_since = time.monotonic()
                    yield stamped
                if ended:
                    return
                silent_since = time.monotonic()
            except NotFound:
                return
            except Refused as error:  # the container waits for its start
                logger.debug("%s", error)
            except TransientError as error:
                if time.monotonic() - silent_since > PATIENCE_S + SILENCE_S:
                    raise
                logger.info("log of %s: %s; trying again", self._name, error)
            self._closed.wait(PAUSE_S)

    def close(self) -> None:
        self._closed.set()
        if self._stream is not None:
            self._stream.close()

    def _has_ended(self) -> bool:
        pod = self._api.get(POD, self._name)
        if str(pod["metadata"].get("uid")) != self._uid:
            raise NotFound(f"{self._name} is another pod now")
        return not is_active(pod)

    def _once(self, follow: bool) -> Iterator[Stamped]:
        """One connection; what an earlier one brought is left out."""
        query = {"container": self._container, "timestamps": "true", "follow": "true" if follow else "",
                 "sinceTime": self._recent.since}  # fmt: skip
        path = POD.path(self._api.namespace, self._name, "log")
        self._stream = self._api.stream(path, query, SILENCE_S)
        if self._closed.is_set():  # while it was opened
            self._stream.close()
        met = self._recent.counted()
        for line in self._stream:
            found = STAMP.match(text := line.decode(errors="replace"))
            if found is None:  # of the node, about the log: no line of it
                logger.debug("log of %s: %s", self._name, text)
                continue
            stamped = (f"{found['second']}.{found['fraction'] or '':0<9}", text[found.end() :])
            if met[stamped]:
                met[stamped] -= 1
                continue
            self._recent.add(found["second"], found["zone"], stamped)
            yield stamped


class Recent:
    """The lines of the last two seconds that had any: a server can leave out only what is older than a whole second.

    Two of them, and not a position, because lines of stdout and stderr may stand in the wrong order, and because a log
    that was rotated begins anew.
    """

    def __init__(self, since: str):
        self._seconds = ("", "")
        self._lines: list[Stamped] = []
        self.since = since
        """From when to ask again."""

    def add(self, second: str, zone: str, stamped: Stamped) -> None:
        before, newest = self._seconds
        if second > newest:
            self._seconds = (newest, second)
            self._lines = [line for line in self._lines if line[0] >= newest]
            self.since = f"{newest or second}{zone}"
        if second >= before:
            self._lines.append(stamped)

    def counted(self) -> Counter[Stamped]:
        return Counter(self._lines)


class Joiner:
    """From lines of pods to those of ranks: parts put together, nothing twice, a gap said aloud. One for a run."""

    def __init__(self, rank: int | None = None):
        self._rank = rank
        self._newest: dict[tuple[int, str], int] = {}
        self._parts: dict[tuple[int, str], list[str]] = {}
        self._bare = 0

    def take(self, text: str, attempt: int) -> LogLine | None:
        """A line of a pod that told of `attempt` so far; None where it completes none that is asked for."""
        said = parse(text)
        if said is None:
            self._bare += 1
            return LogLine(attempt, None, self._bare, text) if self._rank is None else None
        if said.kind != "log" or (self._rank is not None and said.rank != self._rank):
            return None
        return self._numbered(said)

    def _numbered(self, said: Said) -> LogLine | None:
        key = (said.attempt, source(said.rank, said.node or 0))
        newest = self._newest.get(key, 0)
        if said.number <= newest:
            return None
        parts = self._parts.setdefault(key, [])
        parts.append(said.text)
        if said.more:
            return None
        if said.number > newest + 1:
            self._tell_gap(key, newest + 1, said.number - 1)
        self._newest[key] = said.number
        text = "".join(parts)
        parts.clear()
        return LogLine(said.attempt, said.rank, said.number, text)

    def _tell_gap(self, key: tuple[int, str], first: int, last: int) -> None:
        attempt, who = key
        place = f"logs/attempt_{attempt}/rank_{who[1:]}.log of the run's folder has them" if who[0] == "r" else "lost"
        logger.warning(
            "lines %d to %d of %s in attempt %d are gone from the node: %s", first, last, who, attempt, place
        )


def attempt_of(text: str, before: int) -> int:
    """The attempt that a line tells of, or the one that was told of before it."""
    said = parse(text)
    return said.attempt if said and said.attempt else before


def read_ended(api: Api, pods: Iterable[Object], joiner: Joiner) -> Iterator[LogLine]:
    """Lines of pods as they are now: by attempt, then as they came."""
    logs = [_by_attempt(PodLog(api, pod).read()) for pod in pods if has_log(pod)]
    for attempt, _, text in heapq.merge(*logs):
        line = joiner.take(text, attempt)
        if line is not None:
            yield line


def with_earlier(lines: Iterator[LogLine], earlier: Callable[[int | None], Iterator[LogLine]]) -> Iterator[LogLine]:
    """Before the first line of an attempt that is not the first one, what the run's folder has of those before it.

    `earlier` reads them up to an attempt; None: all, for no pod is left.
    """
    first = True
    for line in lines:
        if first and line.attempt > 1:
            yield from earlier(line.attempt)
        first = first and line.attempt == 0
        yield line
    if first:
        yield from earlier(None)


def _by_attempt(lines: Iterator[Stamped]) -> Iterator[tuple[int, str, str]]:
    """(attempt, stamp, line): what a pod says before it knows its attempt belongs to that one."""
    early: list[Stamped] = []
    attempt = 0
    for stamp, text in lines:
        attempt = max(attempt, attempt_of(text, attempt))
        if attempt == 0:
            early.append((stamp, text))
            continue
        yield from ((attempt, *one) for one in early)
        early.clear()
        yield attempt, stamp, text
    yield from ((attempt, *one) for one in early)
