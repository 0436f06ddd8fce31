"""One remote file, whole: tried again after failures, from the byte where the connection broke."""

from __future__ import annotations

import hashlib
import io
import logging
import random
from dataclasses import dataclass, field
from threading import Event
from typing import IO, Any

from orchestrator.data.remote import Refused, Reply, open_at
from orchestrator.errors import DataError, TransientError
from orchestrator.redact import redact

TRIES = 6
"""In a row without progress; bytes of at least `PROGRESS` begin the count anew."""
PROGRESS = 1 << 16
PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
STALL_S = 30.0
_FINAL = {400, 401, 403, 404, 405, 410, 451}
_ADVICE = {
    400: "check the address, and the keys in the environment or in the file of cluster.store_secret",
    401: "check the credentials in the environment, or the file of cluster.store_secret",
    403: "check the credentials in the environment, or the file of cluster.store_secret, and that they may read this",
    404: "check bucket and name, or `orchestrator shards index` over what is served now",
}

log = logging.getLogger(__name__)


class Shorter(Exception):
    """All that is served has come, and it is not as long as it should be; `args[0]` is the served length."""


class _Restart(Exception):
    """What came so far does not fit what comes now."""


@dataclass
class Transfer:
    """A download in progress: `file` holds the first `got` bytes, and `digest` knows them."""

    url: str
    file: IO[bytes]
    size: int | None
    """Length it must have, in bytes; None: what the server says."""
    stop: Event = field(default_factory=Event)
    got: int = 0
    tries: int = 0
    retries: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    _version: str | None = None
    _served: list[int] = field(default_factory=list)

    def run(self) -> str:
        """Fetch everything; returns its sha256.

        Raises TransientError after `TRIES` fruitless tries, DataError where trying again cannot help, Shorter.
        """
        fruitless = 0
        while True:
            before, self.tries = self.got, self.tries + 1
            try:
                self._try()
                return self.digest.hexdigest()
            except _Restart as reason:
                self._from_start()
                last: Exception = Refused(str(reason))
            except OSError as error:
                if error.errno is not None:  # the disk, not the network
                    raise
                last = error
            fruitless = 0 if self.got - before >= PROGRESS else fruitless + 1
            self._require_hope(last, fruitless)
            self.retries += 1
            self._pause(last, fruitless)

    def _try(self) -> None:
        reply = open_at(self.url, self.got, self._version, STALL_S)
        try:
            self._require_same(reply)
            while self.size is None or self.got < self.size:
                if self.stop.is_set():
                    raise TransientError(f"{redact(self.url)}: the download was stopped")
                chunk = reply.read()
                if not chunk:
                    break
                self._keep(chunk)
        finally:
            reply.close()
        wanted = reply.total if self.size is None else self.size
        if wanted is not None and self.got != wanted:
            self._require_more(reply)
            raise Refused(f"the connection ended at byte {self.got:,} of {wanted:,}")

    def _require_same(self, reply: Reply) -> None:
        if self.size is not None and reply.total is not None and reply.total > self.size:
            self._note_length(reply.total)
            raise Refused(f"{reply.total:,} bytes are served")
        if reply.start != self.got or (self.got and reply.version != self._version):
            if self.got and reply.start == 0 == self._from_start():
                log.debug("%s: began again", redact(self.url))  # ranges are ignored, or the content changed
            if reply.start != self.got:
                raise _Restart(f"bytes from {reply.start:,} on came instead of {self.got:,}")
        self._version = reply.version

    def _require_more(self, reply: Reply) -> None:
        """A server that says the same other length twice means it."""
        if reply.total == self.got and self.size is not None and self.got < self.size:
            self._note_length(self.got)

    def _note_length(self, served: int) -> None:
        self._served.append(served)
        if self._served.count(served) >= 2:
            raise Shorter(served)

    def _keep(self, chunk: bytes) -> None:
        if self.size is not None and self.got + len(chunk) > self.size:
            self._note_length(self.got + len(chunk))
            raise _Restart(f"{self.got + len(chunk):,} bytes came")
        self.file.write(chunk)
        self.digest.update(chunk)
        self.got += len(chunk)

    def _from_start(self) -> int:
        self.file.seek(0)
        self.got, self.digest, self._version = 0, hashlib.sha256(), None
        return 0

    def _require_hope(self, last: Exception, fruitless: int) -> None:
        status = getattr(last, "status", None)
        served = getattr(last, "served", None)
        if served is not None and served == self.got and self.size is not None:
            raise Shorter(served)
        if status == 412 or (status == 416 and self.got):
            self._from_start()
        if status in _FINAL:
            way_out = _ADVICE.get(status, "check the address")
            raise DataError(f"{redact(self.url)}: download failed ({last}). Way out: {way_out}") from None
        if fruitless >= TRIES:
            raise TransientError(
                f"{redact(self.url)}: download failed after {self.tries} tries ({last}; status {status or 'none'}), "
                f"{self.got:,} {self._of()}bytes had come. Way out: check the address and the network"
            ) from None

    def _of(self) -> str:
        return f"of {self.size:,} " if self.size is not None else ""

    def _pause(self, last: Exception, fruitless: int) -> None:
        asked = getattr(last, "retry_after", None)
        jitter = random.uniform(0.5, 1)  # many readers must not come back as one
        backoff = min(LONGEST_PAUSE_S, PAUSE_S * 2**fruitless) * jitter
        seconds = max(backoff, min(LONGEST_PAUSE_S, asked) + PAUSE_S * jitter) if asked else backoff
        log.debug("%s: try %d failed (%s), again in %.1f s", redact(self.url), self.tries, last, seconds)
        self.stop.wait(seconds)


def read_all(url: str) -> bytes:
    """A small remote file. Raises TransientError, DataError."""
    file = io.BytesIO()
    transfer = Transfer(url, file, None)
    transfer.run()
    file.truncate(transfer.got)
    return file.getvalue()
