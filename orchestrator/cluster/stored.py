"""A run's record in an object store: a node works in a folder of its own, and a thread makes the store equal to it.

Keys are the paths of files in the run's folder; checkpoints have their own mirror there.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from orchestrator.cluster.claim import Claim, RecordTaken
from orchestrator.cluster.record import is_finished
from orchestrator.errors import ConfigError, TransientError, UserError
from orchestrator.redact import redact
from orchestrator.train.bucket import Bucket, StoreError

log = logging.getLogger(__name__)
T = TypeVar("T")
RESULT = "result.json"
NEEDED = ("run.json", RESULT, "virtual_ranks.json")
"""What the first node goes on from, besides the events."""
CHECKPOINTS = "checkpoints"
UNSENT = ("lock", "orders")
UNSENT_ENDS = (".heartbeat", ".stacks", ".tmp")
"""What only a living launcher reads."""
RANK_EVENTS = re.compile(r"events/rank_(\d+)\.jsonl")
ATTEMPT = re.compile(r"logs/attempt_(\d+)/")
FIRST_S = 1.0
PAUSE_S = 5.0
SHARE = 10
"""Big records are sent more seldom: at most a tenth of the time goes to that."""
LONGEST_PAUSE_S = 30.0
START_TRIES = 5
SILENCE_S = 30.0
Stamp = tuple[int, int]
"""Size and time of the last change, by which a file is known to be there as it is."""


class StoredRecord:
    """The record of one run as one node's launcher keeps it; `folder` is the node's own.

    The store is used by the caller until `begin` or `join` starts the thread, then by that one alone.
    """

    def __init__(self, url: str, folder: Path):
        self._bucket, self._folder = Bucket(url, SILENCE_S), folder
        self._claim, self._ranks = Claim(self._bucket), range(0)
        self._known: dict[str, Stamp] = {}
        """What the store has, as it was when it was sent or brought."""
        self._sent: set[str] = set()
        self._looked, self._writes = 0.0, False
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._asked, self._served, self._closed, self._failing = 0, 0, False, ""
        self._taken: RecordTaken | None = None

    hang_up_s = 30.0
    """How long the first node lets the others bring their logs and events to the store at the end of an attempt."""

    def is_finished(self) -> bool:
        """Whether the run has come to its end; asks the store now and then."""
        now = time.monotonic()
        if not self._looked:
            (self._folder / RESULT).unlink(missing_ok=True)
        if not self._looked or now - self._looked > PAUSE_S:
            self._patiently(lambda: self._bring([RESULT]))
            self._looked = now
        return is_finished(self._folder)

    def claim(self) -> None:
        """Become the one that writes the run's record, and get what the run goes on from. Of the first node."""
        self._empty()
        self._patiently(self._claim.raise_generation)
        self._writes = True
        self._patiently(self._bring_record)

    def begin(self, attempt: int, ranks: range) -> None:
        """An attempt of the first node's begins, whose `ranks` are here."""
        self._ranks = ranks
        self._patiently(lambda: self._claim.note_attempt(attempt))
        self._start()

    def join(self, attempt: int, ranks: range) -> None:
        """Another node takes part with these ranks, whose events go on; its checkpoint comes from the first rank."""
        self._ranks = ranks
        self._claim.follow(attempt)
        self._writes = True
        self._empty()
        shutil.rmtree(self._folder / CHECKPOINTS, ignore_errors=True)
        self._patiently(lambda: self._bring([f"events/rank_{rank}.jsonl" for rank in ranks]))
        self._start()

    def check(self) -> None:
        """Raises RecordTaken where another start of the run has the record now."""
        if self._taken is not None:
            raise self._taken

    def flush(self, limit_s: float) -> str | None:
        """Have the whole record there, and on the first node the others' events here; why not, where it takes longer.

        Raises RecordTaken.
        """
        if not self._writes:
            return None
        self._start()
        with self._wake:
            self._asked += 1
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._served >= self._asked or self._taken is not None, limit_s)
            self.check()
            return None if self._served >= self._asked else self._failing or f"not done within {limit_s:.0f} s"

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._bucket.close()
        if self._thread is not None:
            self._thread.join(1.0)

    def _patiently(self, work: Callable[[], T]) -> T:
        """Raises TransientError where the store does not answer, ConfigError where it refuses."""
        key, url = "runs_dir", redact(self._bucket.url.rpartition("/")[0])
        for left in reversed(range(START_TRIES)):
            try:
                return work()
            except StoreError as error:
                text = redact(str(error))
                if not error.passing:
                    way_out = "mend the address, the keys (cluster.store_secret) or their rights"
                    raise ConfigError(key, url, text, way_out) from None
                if not left:
                    way_out = "nothing where it comes back: the next start goes on"
                    raise TransientError(f"{key} = {url}: {text}. Way out: {way_out}") from None
            time.sleep(2.0 ** (START_TRIES - 1 - left) / 4)
        raise AssertionError("the last try returns or raises")

    def _empty(self) -> None:
        """The store has the record; what an earlier life left here may be older. Its checkpoints verify themselves."""
        for path in self._folder.glob("*"):
            if path.name in (CHECKPOINTS, *UNSENT):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _bring_record(self) -> None:
        there = self._bucket.entries()
        self._bring(key for key in there if key in NEEDED or key.startswith("events/"))
        begun = [int(found[1]) for key in there if (found := ATTEMPT.match(key))]
        last = max([self._claim.attempt, *begun])
        if last:  # attempts are counted by these folders
            (self._folder / "logs" / f"attempt_{last}").mkdir(parents=True, exist_ok=True)

    def _bring(self, keys: Iterable[str]) -> None:
        """Those that are there."""
        for key in keys:
            path = place_of(self._folder, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            coming = path.with_name(f".{path.name}.coming.tmp")
            try:
                if self._bucket.get_file(key, coming):
                    os.replace(coming, path)
                    self._known[key] = _stamp(path)
            finally:
                coming.unlink(missing_ok=True)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True, name="record")
            self._thread.start()

    def _serve(self) -> None:
        pause_s = FIRST_S
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._served < self._asked, pause_s)
                asked = self._asked
            if self._closed:
                return
            began = time.monotonic()
            try:
                self._round(whole=self._served < asked)
            except StoreError as error:
                pause_s = self._tell_failure(error, pause_s)
                continue
            except RecordTaken as error:
                self._end(error)
                return
            pause_s = max(PAUSE_S, SHARE * (time.monotonic() - began))
            self._tell_success(asked)

    def _end(self, error: RecordTaken) -> None:
        with self._wake:
            self._taken = error
            self._wake.notify_all()

    def _tell_failure(self, error: StoreError, pause_s: float) -> float:
        """The next pause."""
        if not self._closed and not self._failing:
            log.warning("%s; the run goes on and its record is sent again", redact(str(error)))
        self._failing = redact(str(error))
        with self._wake:
            self._wake.wait_for(lambda: self._closed, 0.5 if self._served < self._asked else 0.0)
        return min(LONGEST_PAUSE_S, 2 * pause_s)

    def _tell_success(self, asked: int) -> None:
        if self._failing:
            log.warning("the record's store %s answers again", redact(self._bucket.url))
        with self._wake:
            self._failing, self._served = "", asked
            self._wake.notify_all()

    def _round(self, whole: bool) -> None:
        """Send what has changed; `whole`: also what another writer may have replaced."""
        files = self._files()
        changed = [name for name, stamp in files.items() if self._known.get(name) != stamp]
        if changed or whole:
            self._claim.require_mine()
        for name in sorted(changed, key=lambda name: (name == RESULT, name)):  # which says that the run is done
            self._send(name, files[name])
        if not whole:
            return
        there = self._bucket.entries()
        for name in sorted(self._sent & files.keys()):
            if there.get(name, (None,))[0] != files[name][0]:
                self._send(name, files[name])
        if self._claim.is_first:
            events = {key: found for key in there if (found := RANK_EVENTS.fullmatch(key))}
            self._bring(key for key, found in events.items() if int(found[1]) not in self._ranks)

    def _send(self, name: str, stamp: Stamp) -> None:
        try:
            self._bucket.put_file(name, self._folder / name)
        except StoreError:
            if (self._folder / name).exists():
                raise
            return  # removed meanwhile
        self._known[name] = stamp
        self._sent.add(name)

    def _files(self) -> dict[str, Stamp]:
        found = {}
        for root, folders, names in os.walk(self._folder):
            own = Path(root).relative_to(self._folder)
            folders[:] = [name for name in folders if not name.startswith(".") and name != CHECKPOINTS]
            for name in names:
                if name.startswith(".") or name in UNSENT or name.endswith(UNSENT_ENDS):
                    continue
                try:
                    found[str(own / name)] = _stamp(Path(root, name))
                except FileNotFoundError:
                    continue
        return found


def place_of(folder: Path, key: str) -> Path:
    """Where a key's file lies. Raises UserError for one that lies elsewhere."""
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts:
        raise UserError(f"{key}: lies outside of the run's folder. Way out: look at who writes to the store")
    return folder.joinpath(*parts)


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
