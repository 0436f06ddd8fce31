"""Histories of kills on a clock of their own: the events that a run would leave, and where its time truly went."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of a run's parts, and its intervals in steps."""

    steps: int = 60
    world_size: int = 2
    launch_s: float = 0.8
    """From the command until the ranks of its first attempt begin, and what that attempt's start takes more."""
    import_s: float = 0.2
    start_s: float = 0.5
    data_s: float = 0.01
    step_s: float = 0.1
    wait_s: float = 0.02
    save_s: float = 0.3
    write_s: float = 0.0
    """From the end of a save's stall until a kill no longer loses the steps before it."""
    eval_s: float = 0.4
    finish_s: float = 0.6
    detect_s: float = 0.1
    pause_s: float = 0.3
    save_every: int = 7
    log_every: int = 5
    eval_every: int = 20


class Killed(Exception):
    """The kill came."""


@dataclass
class Simulation:
    """Plays a run whose attempts are killed at the times that `next_kill` gives, counted from each attempt's start.

    A kill beyond the end of an attempt does not come. With probability `night` the launcher dies with its ranks, and
    somebody starts it again an hour later.
    """

    costs: Costs
    next_kill: Callable[[], float]
    night: float = 0.0
    luck: random.Random = field(default_factory=lambda: random.Random(0))
    now: float = 1_700_000_000.0
    ranks: dict[int, list[Event]] = field(default_factory=dict)
    launcher: list[Event] = field(default_factory=list)
    truth: dict[str, float] = field(default_factory=dict)
    wasted_steps: int = 0
    kills: int = 0
    _attempt: int = 0
    _open: dict[str, float] = field(default_factory=dict)
    _told: float = 0.0
    _saved: int = 0
    _step: int = 0
    _deadline: float = 0.0
    _unsaved: dict[str, float] = field(default_factory=dict)
    _writing: tuple[int, float] | None = None
    """Step of the save that is not on the disk yet, and when it will be."""
    _since: dict[str, float] = field(default_factory=dict)
    """What was spent since that save."""

    def play(self) -> Simulation:
        self.ranks = {rank: [] for rank in range(self.costs.world_size)}
        self.launch()
        while True:
            try:
                self.attempt()
                break
            except Killed:
                self.recover()
        self.spend("finish", 0.2, told=False)
        self.launcher.append({"t": self.now, "attempt": self._attempt, "kind": "end", "exit_code": 0})
        return self

    def launch(self) -> None:
        began = self.now
        self.spend("start", self.costs.launch_s, told=False)
        facts = {"world_size": self.costs.world_size, "began": began}
        self.launcher.append({"t": self.now, "attempt": self._attempt + 1, "kind": "launch", **facts})

    def attempt(self) -> None:
        costs = self.costs
        self._attempt += 1
        self._step, self._told = self._saved, self.now
        self._writing, self._unsaved, self._since = None, {}, {}
        self._deadline = self.now + self.next_kill()
        began, self._open = self.now, {}
        self.spend("import", costs.import_s)
        self.spend("start", costs.start_s)
        self.tell("start", began=began, world_size=costs.world_size, device="cpu")
        self.spend("start", 0.1)
        self.tell("first_step")
        while self._step < costs.steps:
            self.step()
        self.tell("trained")
        self.spend("finish", costs.finish_s)
        self.tell("end", exit_code=0)

    def step(self) -> None:
        costs = self.costs
        self.spend("data_wait", costs.data_s)
        self.spend("compute", costs.step_s)
        self.spend("communication_wait", costs.wait_s)
        self._step += 1
        if self._step % costs.log_every == 0 or self._step == costs.steps:
            self.tell("step")
        if self._step % costs.eval_every == 0:
            self.spend("evaluation", costs.eval_s)
            self.tell("eval")
        if self._step % costs.save_every == 0 or self._step == costs.steps:
            self.spend("checkpoint_stall", costs.save_s)
            self.written()  # a save waits for the one before it
            self.tell("save")
            self._writing, self._since = (self._step, self.now + costs.write_s), {}
            self.look_at_the_disk()

    def look_at_the_disk(self) -> None:
        if self._writing is not None and self._writing[1] <= self.now:
            self.written()

    def written(self) -> None:
        """The save that was being written is on the disk, and tells so from a thread that touches no phases."""
        if self._writing is None:
            return
        self._saved, t = self._writing
        saved = {"t": round(min(t, self.now), 3), "attempt": self._attempt, "kind": "saved", "step": self._saved}
        self.ranks[0].append(saved)
        self._writing, self._unsaved = None, dict(self._since)

    def spend(self, phase: str, seconds: float, told: bool = True) -> None:
        """Let time pass; the kill may come within it."""
        spent = min(seconds, self._deadline - self.now) if told else seconds
        self.now += spent
        self.truth[phase] = self.truth.get(phase, 0.0) + spent
        if told:
            self._open[phase] = self._open.get(phase, 0.0) + spent
            for spending in (self._unsaved, self._since):
                spending[phase] = spending.get(phase, 0.0) + spent
            self.look_at_the_disk()
        if spent < seconds:
            raise Killed

    def tell(self, kind: str, **facts: Any) -> None:
        event = {"t": round(self.now, 3), "attempt": self._attempt, "kind": kind, "step": self._step, **facts}
        for events in self.ranks.values():
            events.append({**event, "phases": dict(self._open)})
        self._open, self._told = {}, self.now

    def recover(self) -> None:
        """Steps that were not saved are lost, and so is the save or the step that the kill struck."""
        self.kills += 1
        for phase in ("compute", "data_wait", "communication_wait", "evaluation"):
            self.lose(phase, self._unsaved.get(phase, 0.0))
        self.lose("checkpoint_stall", self._open.get("checkpoint_stall", 0.0))
        self.wasted_steps += self._step - self._saved
        if self.luck.random() < self.night:
            words = [self.launcher[-1:], *self.ranks.values()]
            last = max(event["t"] for events in words for event in events[-1:])
            self.truth = {**self.truth}
            self.forget(self.now - last)
            self.now += 3600.0
            self.truth["idle"] = self.truth.get("idle", 0.0) + 3600.0
            self.launch()
            return
        self.spend("recovery", self.costs.detect_s, told=False)
        facts = {"rank": 1, "step": self._step, "error": "killed by SIGKILL", "silent_s": self.costs.detect_s}
        self.launcher.append({"t": self.now, "attempt": self._attempt, "kind": "fault", **facts})
        self.spend("recovery", self.costs.pause_s, told=False)
        facts = {"world_size": self.costs.world_size}
        self.launcher.append({"t": self.now, "attempt": self._attempt + 1, "kind": "restart", **facts})

    def forget(self, seconds: float) -> None:
        """What a rank did after its last word is told by nobody when the launcher died too: it looks idle."""
        states = ("lost_work", "start", "import", "finish")
        for phase in states:
            taken = min(seconds, self._untold(phase))
            self.truth[phase] = self.truth.get(phase, 0.0) - taken
            self.truth["idle"] = self.truth.get("idle", 0.0) + taken

    def _untold(self, phase: str) -> float:
        if phase == "lost_work":
            return sum(self._open.get(name, 0.0) for name in ("compute", "data_wait", "communication_wait",
                                                               "evaluation", "checkpoint_stall"))  # fmt: skip
        return self._open.get(phase, 0.0)

    def lose(self, phase: str, seconds: float) -> None:
        self.truth[phase] = self.truth.get(phase, 0.0) - seconds
        self.truth["lost_work"] = self.truth.get("lost_work", 0.0) + seconds


def exponential_kills(mean_s: float, seed: int, most: int = 10**6) -> Callable[[], float]:
    """Times between kills of a machine that fails once in `mean_s`, at most so many of them."""
    luck = random.Random(seed)

    def kills() -> Iterator[float]:
        for _ in range(most):
            yield luck.expovariate(1 / mean_s)
        while True:
            yield float("inf")

    times = kills()
    return lambda: next(times)
