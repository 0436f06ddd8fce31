"""What a rank prints goes to its log without the secrets that it has read: a user's own print() as well as logging."""

from __future__ import annotations

import io
import os
import sys
import threading

from orchestrator.redact import redactor


class Clean(io.TextIOWrapper):
    """Text of a stream, redacted before it is written: line by line, and what is flushed amid a line as it is then.

    Text that is written at once is redacted at once, so that a key of many lines is known by its first one. Bytes that
    pass by (`buffer`, native code, a child) are not seen here.
    """

    def __init__(self, descriptor: int):
        raw = open(descriptor, "wb", closefd=False)  # noqa: SIM115
        super().__init__(raw, encoding="utf-8", errors="backslashreplace")
        self._held: list[str] = []
        self._clean = redactor()
        self._writing = threading.RLock()

    def write(self, text: str, /) -> int:
        with self._writing:
            whole, newline, rest = text.rpartition("\n")
            if newline:
                self._put("".join([*self._held, whole, newline]))
                self._held = []
            if rest:
                self._held.append(rest)
        return len(text)

    def flush(self) -> None:
        with self._writing:
            if self._held:
                self._put("".join(self._held))
                self._held = []

    def begin_anew(self) -> None:
        """After a fork: the half line is the parent's, and a lock may be held by a thread that is not here."""
        self._held, self._writing = [], threading.RLock()

    def _put(self, text: str) -> None:
        """At once: nobody knows when a rank is killed."""
        super().write(self._clean(text))
        super().flush()


def redact_output() -> None:
    """Let everything that this process prints from now on pass through `redactor`."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        getattr(sys, name).flush()
        setattr(sys, name, Clean(descriptor))
    os.register_at_fork(after_in_child=_begin_anew)


def _begin_anew() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Clean):
            stream.begin_anew()
