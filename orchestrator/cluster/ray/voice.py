"""What the driver prints, which is the job's log: every rank's lines from the run's folder, its own, and the end."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.bundle import Bundle
from orchestrator.cluster.cause import Ended
from orchestrator.cluster.local import next_attempt
from orchestrator.cluster.speaker import FactTeller, LogTail, Speaker, facts_of
from orchestrator.files import read_json

SCHEMA = 1


@dataclass(slots=True)
class Voice:
    """Speaks for one job; follows the attempts that its workers start."""

    speaker: Speaker
    folder: Path
    ranks: int
    """The most that an attempt may have."""
    attempt: int = field(init=False)
    tail: LogTail | None = None
    facts: FactTeller | None = None

    def __post_init__(self) -> None:
        self.attempt = next_attempt(self.folder) - 1

    def look(self) -> bool:
        """Turn to the newest attempt; returns whether the job has started one."""
        newest = next_attempt(self.folder) - 1
        if newest > self.attempt:
            self._end_tail()
            self.attempt = newest
            self.speaker.begin(newest)
            logs = self.folder / "logs" / f"attempt_{newest}"
            self.tail = LogTail(self.speaker, {rank: logs / f"rank_{rank}.log" for rank in range(self.ranks)}, newest)
            self.facts = self.facts or FactTeller(self.speaker, self._facts)
        return self.tail is not None

    def end(self, bundle: Bundle, ended: Ended) -> int:
        """The last words: the traceback, the first true cause, and the same as JSON; returns the exit code."""
        self._end_tail()
        if self.facts:
            self.facts.end()
        if ended.traceback:
            self.speaker.put(ended.traceback.rstrip() + "\n")
        if ended.error:
            where = f"rank {ended.rank}: " if ended.rank is not None else ""
            self.speaker.put(f"error: {where}{ended.error}\n")
        self.speaker.put(json.dumps(self._last_words(bundle, ended)) + "\n")
        return ended.exit_code

    def _last_words(self, bundle: Bundle, ended: Ended) -> dict[str, object]:
        path = bundle.folder / "result.json"
        return {
            "schema": SCHEMA,
            "run_id": bundle.run_id,
            "attempt": self.attempt,
            "node": None,
            "rank": ended.rank,
            "exit_code": ended.exit_code,
            "error": ended.error,
            "step": read_json(path)["step"] if path.exists() else 0,
        }

    def _facts(self) -> dict[str, object]:
        return facts_of(self.folder, self.attempt, 0)

    def _end_tail(self) -> None:
        if self.tail:
            self.tail.end()
