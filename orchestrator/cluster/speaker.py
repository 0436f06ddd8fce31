"""What the launcher of a node prints: its ranks' logs as they are written, its own words, where the run stands."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from orchestrator.cluster.lines import Numbered, progress_line, source
from orchestrator.redact import redact, redactor

LOOK_S = 0.1
CHUNK = 1 << 20
DRAIN_S = 30.0
"""How long the end of a node waits for a stdout that takes nothing."""
FACTS_S = 5.0
FACTS_SHARE = 50
"""Facts are worked out from the whole record: at most a fiftieth of the time goes to that."""


class Speaker(logging.Handler):
    """The one writer of a node's stdout; warnings of the launcher's own modules go through it, too."""

    def __init__(self, out: IO[bytes], node: int):
        super().__init__(logging.WARNING)
        self._out, self._node, self._attempt = out, node, 0
        self._speaking = threading.RLock()
        self._numbered = Numbered(0, source(None, node), redact)

    def begin(self, attempt: int) -> None:
        """The attempt that is spoken of from now on; the numbers of lines start again."""
        with self._speaking:
            self._attempt, self._numbered = attempt, Numbered(attempt, source(None, self._node), redact)

    def say(self, text: str) -> None:
        """Words of the launcher."""
        with self._speaking:
            self._write(self._numbered.feed(text.encode(errors="replace") + b"\n"))

    def emit(self, record: logging.LogRecord) -> None:
        self.say(self.format(record))

    def put(self, lines: str) -> None:
        """Whole lines that have their prefixes."""
        if lines:
            with self._speaking:
                self._write(lines)

    def tell_facts(self, facts: Mapping[str, Any]) -> None:
        self.put(progress_line(self._attempt, self._node, facts))

    def _write(self, lines: str) -> None:
        with suppress(OSError, ValueError):  # a reader that is gone must not end the run
            self._out.write(lines.encode())
            self._out.flush()


class LogTail:
    """Follows the logs of some ranks in a thread until `end`, which leaves nothing out."""

    def __init__(self, speaker: Speaker, paths: Mapping[int, Path], attempt: int):
        self._speaker, self._paths = speaker, paths
        clean = redactor()
        self._numbered = {rank: Numbered(attempt, source(rank, 0), clean) for rank in paths}
        self._files: dict[int, IO[bytes]] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log tail", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Print what is left; the ranks have ended."""
        self._ending.set()
        self._thread.join(DRAIN_S)

    def _run(self) -> None:
        ending = False
        while not ending:
            ending = self._ending.wait(LOOK_S)  # and one more look, at what was written before the end
            for rank in self._paths:
                self._follow(rank, ending)
        for file in self._files.values():
            file.close()

    def _follow(self, rank: int, last: bool) -> None:
        file = self._file(rank)
        with suppress(OSError):  # a network disk that fails now may answer at the next look
            while content := file.read(CHUNK) if file else b"":
                self._speaker.put(self._numbered[rank].feed(content))
        if last:
            self._speaker.put(self._numbered[rank].feed(b"", last=True))

    def _file(self, rank: int) -> IO[bytes] | None:
        if rank not in self._files:
            with suppress(OSError):
                self._files[rank] = open(self._paths[rank], "rb", buffering=0)  # noqa: SIM115
        return self._files.get(rank)


class FactTeller:
    """Prints where the run stands, now and then, in a thread."""

    def __init__(self, speaker: Speaker, read: Callable[[], Mapping[str, Any]]):
        self._speaker, self._read = speaker, read
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="facts", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ending.set()
        self._thread.join(DRAIN_S)

    def _run(self) -> None:
        pause = FACTS_S
        while not self._ending.wait(pause):
            began = time.thread_time()
            self.tell()
            pause = max(FACTS_S, FACTS_SHARE * (time.thread_time() - began))
        self.tell()

    def tell(self) -> None:
        try:
            self._speaker.tell_facts(self._read())
        except Exception as error:  # a record that is being written must not end what tells of it
            logging.getLogger(__name__).debug("no facts: %s", error)


def facts_of(folder: Path, attempt: int, step: int) -> dict[str, Any]:
    """Where a run stands. `step`: the newest one, which the record may not tell yet."""
    from orchestrator.track.runs import load_run
    from orchestrator.track.status import status_of

    facts = status_of(load_run(folder), os.getpid(), time.time())
    kept = ("run_id", "state", "world_size", "total_steps", "epoch", "eta_s", "images_per_s", "goodput")
    now = {"schema": 1, "t": round(time.time(), 3), "attempt": attempt, "step": max(step, facts["step"])}
    return {**now, **{key: facts[key] for key in kept}}
