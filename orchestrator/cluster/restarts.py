"""Whether a run that ended starts again, and after which pause: a pure function of its attempts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.cluster.cause import FINAL, Ended
from orchestrator.errors import EXIT_NO_PROGRESS, EXIT_RESIZED, EXIT_TERMINATED

TRIES = 3
"""Attempts running that may fail by themselves without getting a step further."""
LONGEST_PAUSE_S = 300.0
MENDED = FINAL - {EXIT_TERMINATED}
"""Ends after which a person starts the run again, with other tries: not a preemption, after which a cluster does."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What counts of an attempt."""

    ended: Ended
    step: int
    """The last step that every rank had computed, saved or not: a fault that waits at one step stops all attempts
    there, while faults at random places get further now and then."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`ended`: how the run ends, None where it starts again after `pause_s`."""

    ended: Ended | None
    pause_s: float = 0.0


def decide(attempts: Sequence[Attempt], max_restarts: int, backoff_s: float) -> Verdict:
    """Judge the attempts of one command, the last of which has just ended."""
    last = attempts[-1].ended
    if last.exit_code == EXIT_RESIZED:
        return Verdict(None)
    if final := final_end(attempts):
        return Verdict(final)
    if count_restarts(attempts) > max_restarts:
        return Verdict(last)
    return Verdict(None, pause_s(attempts, backoff_s))


def final_end(attempts: Sequence[Attempt]) -> Ended | None:
    """How the run ends whatever restarts are left; None where another attempt may mend it."""
    last = attempts[-1].ended
    if last.exit_code in FINAL:
        return last
    return _no_progress(attempts) if fruitless(attempts) >= TRIES else None


def read_attempts(events: Iterable[Mapping[str, Any]]) -> list[Attempt]:
    """Those that the journal tells of, since the last one after which somebody had to start the run again.

    An attempt whose launcher was killed has told nothing and is none of the run's own failures.
    """
    attempts: dict[int, Attempt] = {}
    for event in events:
        if event["kind"] == "end" and event["exit_code"] in MENDED:
            attempts = {}
        elif event["kind"] == "fault":
            own = bool(event.get("by_itself"))
            ended = Ended(event["exit_code"], event["rank"], event["error"], signal=event["signal"], by_itself=own)
            attempts[event["attempt"]] = Attempt(ended, event["step"] or 0)
    return list(attempts.values())


def count_restarts(attempts: Sequence[Attempt]) -> int:
    """Starts that the attempts have asked for; a change of the number of processes is none."""
    return sum(attempt.ended.exit_code != EXIT_RESIZED for attempt in attempts)


def fruitless(attempts: Sequence[Attempt]) -> int:
    """Attempts that failed by themselves, from the first one on that came as far as any has come."""
    best = max(attempt.step for attempt in attempts)
    first = next(number for number, attempt in enumerate(attempts) if attempt.step == best)
    return sum(attempt.ended.by_itself for attempt in attempts[first:])


def pause_s(attempts: Sequence[Attempt], backoff_s: float) -> float:
    """No pause after progress or for the first restart; else it doubles from one to the next."""
    idle = 0
    for number in range(len(attempts) - 1, 0, -1):
        if attempts[number].step > max(attempt.step for attempt in attempts[:number]):
            break
        idle += 1
    return min(LONGEST_PAUSE_S, backoff_s * 2 ** min(idle - 1, 20)) if idle else 0.0


def _no_progress(attempts: Sequence[Attempt]) -> Ended:
    last, best = attempts[-1].ended, max(attempt.step for attempt in attempts)
    where = f"beyond step {best}" if best else "through its first step"
    return replace(
        last,
        exit_code=EXIT_NO_PROGRESS,
        error=f"no progress: the run failed by itself in {fruitless(attempts)} attempts without getting {where}, "
        f"at last so: {last.error}. Way out: mend the cause; the same command then goes on",
    )
