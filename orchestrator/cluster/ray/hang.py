"""Hangs across nodes: every worker watches all ranks through the run's folder and acts for its own."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from orchestrator.bundle import Bundle
from orchestrator.cluster.attempt import told_stacks
from orchestrator.cluster.cause import Ended
from orchestrator.cluster.stacks import Stack, dump_stacks
from orchestrator.cluster.watch import Late, find_late, read_signs
from orchestrator.train.heartbeat import Sign


@dataclass(slots=True)
class Watch:
    """Signs of life by this node's clock: when a rank's beats were last seen to grow."""

    bundle: Bundle
    attempt: int
    world_size: int
    began: float = field(default_factory=time.monotonic)
    seen: dict[int, Sign] = field(default_factory=dict)

    def find_hung(self, rank: int, pid: int) -> Ended | None:
        """How this node's rank ended if the group hangs by its fault."""
        now = time.monotonic()
        self.note(read_signs(self.bundle.folder, self.attempt, range(self.world_size), self.began), now)
        late = find_late(self.seen, self.bundle.config.cluster, now)
        own = next((found for found in late if found.rank == rank), None)
        return own and self._hung(own, pid)

    def note(self, signs: dict[int, Sign], now: float) -> None:
        """Keep the time of a sign that is still the same."""
        for rank, sign in signs.items():
            known = self.seen.get(rank)
            if known is None or known.beats != sign.beats:
                self.seen[rank] = replace(sign, t=now)

    def _hung(self, late: Late, pid: int) -> Ended:
        stack = dump_stacks(self.bundle.folder, self.attempt, {late.rank: pid}).get(late.rank, Stack(False, ()))
        budget = getattr(self.bundle.config.cluster, late.key)
        error = (
            f"hung: no sign of life for {late.silent_s:.1f} s in phase {late.phase} after step {late.step} "
            f"(cluster.{late.key} = {budget:g})" + (", stopped by a signal (SIGSTOP)" if stack.stopped else "")
        )
        stacks = told_stacks({late.rank: stack}, late.rank)
        return Ended(1, late.rank, error, stacks, by_itself=True, hung=True)
