"""Who may write a run's record in an object store, by ``record.json`` in it.

Each start of the first node raises the generation there by a conditional put, and notes the attempt that it begins.
The first node writes while the generation is its own, the others until a later attempt has begun.
"""

from __future__ import annotations

import json
from typing import Any

from orchestrator.errors import TransientError
from orchestrator.redact import redact
from orchestrator.train.bucket import ABSENT, Bucket, Conflict

SCHEMA = 1
POINTER = "record.json"


class RecordTaken(TransientError):
    """Another start of the run writes its record now."""


class Claim:
    """The right of one node to write, as its launcher knows it; every call may raise StoreError."""

    def __init__(self, bucket: Bucket):
        self._bucket = bucket
        self._generation, self._version = 0, None
        self.attempt = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the first node, which has a generation."""
        return self._generation > 0

    def raise_generation(self) -> None:
        """Become the first node that writes; `attempt` is then the last one that was begun."""
        while True:
            found = self._bucket.get(POINTER)
            earlier = _parse(found)
            generation, attempt = int(earlier.get("generation", 0)) + 1, int(earlier.get("attempt", 0))
            version = (found[1] or None) if found else ABSENT
            try:
                self._version = self._bucket.put(POINTER, _pointer(generation, attempt), version)
            except Conflict:  # somebody else starts at the same time
                continue
            self._generation, self.attempt = generation, attempt
            return

    def note_attempt(self, attempt: int) -> None:
        """Say that this one begins. Raises RecordTaken."""
        content = _pointer(self._generation, attempt)
        try:
            self._version = self._bucket.put(POINTER, content, self._version)
        except Conflict:
            found = self._bucket.get(POINTER)
            if found is None or found[0] != content:  # else an answer was lost on its way
                raise self._taken(attempt) from None
            self._version = found[1]
        self.attempt = attempt

    def follow(self, attempt: int) -> None:
        """Write as another node of this attempt."""
        self.attempt = attempt

    def require_mine(self) -> None:
        """Raises RecordTaken where somebody else may write now."""
        found = _parse(self._bucket.get(POINTER))
        now = (found.get("generation"), found.get("attempt", 0))
        mine = now[0] == self._generation if self.is_first else now[0] is not None and now[1] <= self.attempt
        if not mine:
            raise self._taken(self.attempt)

    def _taken(self, attempt: int) -> RecordTaken:
        return RecordTaken(
            f"another start of this run writes {redact(self._bucket.url)} now, or somebody removed it there, so "
            f"attempt {attempt} ends. Way out: nothing; the newer one goes on"
        )


def _pointer(generation: int, attempt: int) -> bytes:
    return (json.dumps({"schema": SCHEMA, "generation": generation, "attempt": attempt}) + "\n").encode()


def _parse(found: tuple[bytes, str | None] | None) -> dict[str, Any]:
    try:
        value = json.loads(found[0]) if found else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
