"""Requests to stop that reach a launcher. Imports next to nothing, so that a launcher can listen before all else."""

from __future__ import annotations

import atexit
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from orchestrator.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

EXIT_OF_SIGNAL = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_TERMINATED,
    signal.SIGHUP: EXIT_TERMINATED,
    signal.SIGQUIT: EXIT_INTERRUPTED,
}


@dataclass(slots=True)
class StopSignals:
    """Signals that reached the launcher; the most urgent one counts, a second one changes nothing else."""

    received: signal.Signals | None = None
    t: float = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        earlier = self.listen()
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def listen(self) -> dict[signal.Signals, Any]:
        """Take all signals that ask for an end; returns the handlers until now."""
        return {number: signal.signal(number, self._receive) for number in EXIT_OF_SIGNAL}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number))

    def ask(self, number: signal.Signals) -> None:
        """Stop as if this signal had come."""
        if self.received is None:
            self.t = time.monotonic()
        if self.received is None or EXIT_OF_SIGNAL[number] == EXIT_TERMINATED:
            self.received = number

    @property
    def exit_code(self) -> int | None:
        return None if self.received is None else EXIT_OF_SIGNAL[self.received]


def end_deaf() -> None:
    """The exit code is settled: no other request to stop must replace it, nor while the interpreter ends."""
    for number in EXIT_OF_SIGNAL:
        signal.signal(number, signal.SIG_IGN)
        atexit.register(signal.signal, number, signal.SIG_IGN)
