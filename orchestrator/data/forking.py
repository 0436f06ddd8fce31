"""Forked processes that are known to have begun; one that a lock of the parent's holds back is forked again.

A thread of the parent may hold a lock of the interpreter while another one forks; the child then waits for it forever,
before a line of Python runs. CPython before 3.11.10 does so where threads of gloo or NCCL enter Python for a moment
(https://github.com/python/cpython/issues/112275): about once in 500 forks right after an all-reduce.
"""

from __future__ import annotations

import os
import select
import signal
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any

from orchestrator.errors import TransientError

PATIENCE_S = (1.0, 2.0, 4.0, 8.0)
"""How long each fork in turn may take to run; a child on a busy machine takes milliseconds."""


class SureProcess(ForkProcess):
    """`start` returns once the child runs."""

    begun: int | None = None
    """Where the child says so: the writing end of a pipe."""

    @staticmethod
    def _Popen(process_obj: Any) -> Popen:
        return _SurePopen(process_obj)

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        assert self.begun is not None
        os.write(self.begun, b".")
        os.close(self.begun)
        return super()._bootstrap(parent_sentinel)  # pyright: ignore[reportAttributeAccessIssue] (what Popen calls)


class SureForkContext(ForkContext):
    """What `multiprocessing.get_context("fork")` gives, with processes that have begun."""

    Process = SureProcess  # pyright: ignore[reportAssignmentType]


class _SurePopen(Popen):
    def _launch(self, process_obj: SureProcess) -> None:
        for patience_s in PATIENCE_S:
            told, process_obj.begun = os.pipe()
            super()._launch(process_obj)  # pyright: ignore[reportAttributeAccessIssue] (what Popen calls to fork)
            os.close(process_obj.begun)
            # readable as well when the child has died: whoever waits for it will see that
            begun, _, _ = select.select([told], [], [], patience_s)
            os.close(told)
            if begun:
                return
            self._take_back()
        raise TransientError(
            f"{len(PATIENCE_S)} forked processes in turn did not begin within {sum(PATIENCE_S):g} s. Way out: Python "
            "3.11.10 or later, whose forks do not wait for a lock of another thread"
        )

    def _take_back(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.finalizer()  # pyright: ignore[reportOptionalCall] (set by the fork)
