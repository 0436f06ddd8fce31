"""What the launcher does, as JSON lines beside the ranks' own events."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from orchestrator.files import ends_torn
from orchestrator.track.runs import Event, read_events

logger = logging.getLogger(__name__)


class Journal:
    """Appends to `events/launcher.jsonl`. A full disk costs the line: it must not keep a failed run from its end."""

    def __init__(self, folder: Path):
        self._path = folder / "events" / "launcher.jsonl"

    def read(self) -> list[Event]:
        """What it holds so far; lines that a kill tore are left out."""
        return read_events(self._path)

    def write(self, kind: str, attempt: int, t: float | None = None, **facts: Any) -> None:
        event = {"t": round(t or time.time(), 3), "attempt": attempt, "kind": kind, **facts}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torn = ends_torn(self._path)  # the line of a launcher that was killed
            with open(self._path, "ab") as file:
                file.write(b"\n" * torn + json.dumps(event).encode() + b"\n")
        except OSError as error:
            logger.warning("%s: event %s is lost (%s)", self._path, kind, error.strerror)
