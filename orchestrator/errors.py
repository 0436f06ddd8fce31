"""The exception tree: every error that a user meets says what, why and the way out, and owns its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_USER = 42
EXIT_NO_PROGRESS = 43
EXIT_NODE = 44
EXIT_STOPPED = 45
EXIT_RESIZED = 46
"""Between ranks and launcher alone: saved, to go on with another number of processes."""
EXIT_TRANSIENT = 75
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class OrchestratorError(Exception):
    """Anything that ends a command with a message instead of a traceback."""

    exit_code = 1


class UserError(OrchestratorError, ValueError):
    """A mistake that the user can mend; retrying without a change never helps."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """A value in the config breaks a rule.

    The message reads ``key = value: rule. Way out: ...``; `key` is the dotted key as typed on the command line.
    """

    def __init__(self, key: str, value: object, rule: str, way_out: str):
        self.key, self.value, self.rule, self.way_out = key, value, rule, way_out
        super().__init__(f"{key} = {value}: {rule}. Way out: {way_out}")

    def __reduce__(self):
        return type(self), (self.key, self.value, self.rule, self.way_out)


class DataError(UserError):
    """Images, labels, shards or an index are not what they should be."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to something else."""


class NodeError(OrchestratorError):
    """This machine is unfit for the run: disk full, a device lost."""

    exit_code = EXIT_NODE


class DeviceError(NodeError):
    """The device of one rank is unfit; where the number of processes may vary, the run goes on without it."""


class TransientError(OrchestratorError):
    """Something outside failed that may work at the next attempt."""

    exit_code = EXIT_TRANSIENT


class StopRequested(OrchestratorError):
    """The run saved its state and ended because it was asked to; `exit_code` says by whom."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self):
        return type(self), (self.args[0], self.exit_code)


def gist(error: Exception) -> str:
    """The first sentence of what a library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0][:200]


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, or the whole list where it is short."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"one of: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
