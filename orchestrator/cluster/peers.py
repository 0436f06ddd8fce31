"""How the launchers of several nodes bring an attempt to one end: every node reports, the first one judges."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.cluster.attempt import Running, look, obey_signal, tell_fault
from orchestrator.cluster.cause import Ended, first_cause, is_failure, orderly_end
from orchestrator.cluster.lifeline import BEAT_S, GONE, Lifeline, Message
from orchestrator.cluster.record import is_finished
from orchestrator.cluster.stacks import Stack
from orchestrator.errors import EXIT_NO_PROGRESS, EXIT_TRANSIENT
from orchestrator.train.heartbeat import Sign

SETTLE_S = 0.5
"""Between the first report of a failure and the verdict: what it followed from may come later."""
VERDICT_S = 10.0
"""How long a node whose ranks have failed waits for the verdict of the first one."""
STACKS_S = 4.0


@dataclass(frozen=True, slots=True)
class Report:
    """How the ranks of one node ended."""

    codes: Mapping[int, int]
    errors: tuple[dict[str, Any], ...] = ()
    """What they wrote down, if that counts."""
    starved: bool = False
    """Whether the kernel killed a process of the node for its memory meanwhile."""
    lost: str | None = None
    """Why the node itself is gone."""

    @property
    def failed(self) -> bool:
        return self.lost is not None or bool(self.errors) or any(map(is_failure, self.codes.values()))

    def facts(self) -> dict[str, Any]:
        """As a message."""
        return {"codes": list(self.codes.items()), "errors": self.errors, "starved": self.starved}


def report_from(facts: Mapping[str, Any], ahead_s: float) -> Report:
    """`ahead_s`: of this machine's clock, by which the times of errors are compared with those here."""
    errors = tuple({**error, "t": error["t"] + ahead_s} for error in facts["errors"])
    return Report(dict(facts["codes"]), errors, facts["starved"])


def report_of(running: Running, codes: Mapping[int, int]) -> Report | None:
    """The report of this node once its ranks have ended or one has failed, which ends the others."""
    failed = {rank: code for rank, code in codes.items() if is_failure(code)}
    if failed:
        running.group.send(signal.SIGKILL)
        return Report(failed, tuple(running.own_errors()), running.has_starved())
    if len(codes) == len(running.place.ranks):  # a stop whose last save failed did not stop after saving
        return Report(codes, tuple(error for error in running.own_errors() if error["traceback"] is None))
    ended = obey_signal(running)
    if ended is None:
        return None
    running.group.send(signal.SIGKILL)
    return Report(dict.fromkeys(running.place.ranks, ended.exit_code))


def judge(reports: Mapping[int, Report]) -> Ended:
    """How the attempt ended, by the reports of its nodes.

    A rank that a signal killed without a word is the cause of all else, then a node that is gone, then the first error.
    """
    failed = {rank: code for report in reports.values() for rank, code in report.codes.items() if is_failure(code)}
    errors = [error for report in reports.values() for error in report.errors]
    silent = failed.keys() - {error["rank"] for error in errors}
    lost = {node: report.lost for node, report in reports.items() if report.lost is not None}
    if lost and not any(failed[rank] < 0 for rank in silent):
        node = min(lost)
        return Ended(EXIT_TRANSIENT, None, f"node {node} is gone: {lost[node]}")
    if failed or errors:
        return first_cause(failed, errors, any(report.starved for report in reports.values()))
    return orderly_end(code for report in reports.values() for code in report.codes.values())


def exit_code_of(ended: Ended, ranks: range) -> int:
    """With what the node of these ranks ends: a failure's own code where it happened, elsewhere 75."""
    if ended.error is None or ended.exit_code == EXIT_NO_PROGRESS or ended.rank in ranks:
        return ended.exit_code
    return EXIT_TRANSIENT


class First:
    """Node 0's view: it judges."""

    def __init__(self, line: Lifeline, peers: Mapping[int, int], local_world_size: int):
        """`peers`: connections by node."""
        self._line, self._peers, self._size = line, dict(peers), local_world_size
        self._nodes = {peer: node for node, peer in self._peers.items()}
        self._reports: dict[int, Report] = {}
        self._stacks: dict[int, dict[int, Stack]] = {}
        self._failed_at: float | None = None
        self._stop: signal.Signals | None = None

    def tell_all(self, kind: str, **facts: Any) -> None:
        for peer in self._peers.values():
            self._line.send(peer, kind, **facts)

    def hear(self, running: Running) -> None:
        for message in self._line.receive():
            node = self._nodes.get(message.peer)
            if node is not None:
                self._take(running, node, message)
            elif message.kind != GONE:  # the next life of a node, whose present one is not known to be gone yet
                self._line.drop(message.peer)
        stop = running.launch.stop.received
        if stop != self._stop and stop is not None:
            self._stop = stop
            self.tell_all("stop", number=stop)

    def _take(self, running: Running, node: int, message: Message) -> None:
        facts = message.facts
        if message.kind in ("signs", "report"):
            running.signs_elsewhere.update(signs_from(facts["signs"]))
        match message.kind:
            case "report":
                self._reports.setdefault(node, report_from(facts, message.ahead_s))
            case "stop":
                running.launch.stop.ask(signal.Signals(facts["number"]))
            case "stacks":
                self._stacks[node] = {rank: Stack(stopped, tuple(frames)) for rank, stopped, frames in facts["stacks"]}
            case "gone":
                self._reports.setdefault(node, Report({}, lost=facts["why"]))
            case _:
                return
        if node in self._reports:
            running.ended_elsewhere |= set(range(node * self._size, (node + 1) * self._size))

    def decide(self, running: Running, own: Report | None) -> Ended | None:
        """How the attempt ended, once that is clear."""
        if own is not None:
            self._reports[0] = own
        complete, now = len(self._reports) == len(self._peers) + 1, time.monotonic()
        if self._failed_at is None and any(report.failed for report in self._reports.values()):
            self._failed_at = now
        if self._failed_at is not None and (complete or now - self._failed_at > SETTLE_S):
            return self._fail(running)
        if complete:
            return judge(self._reports)
        return look(running) if self._failed_at is None else None

    def _fail(self, running: Running) -> Ended:
        own = self._reports.get(0)
        if own is not None and not any(own.codes.values()) and is_finished(running.folder):
            return Ended(0)  # who is lost after the end has nothing left to do
        ended = judge(self._reports)
        if ended.error:
            tell_fault(running, ended, "node" if ended.rank is None else "signal" if ended.signal else "exit")
        return ended

    def stacks(self, running: Running) -> dict[int, Stack]:
        """Those of the ranks of other nodes, as far as they answer in time."""
        self._stacks = {}
        self.tell_all("stacks")
        until = time.monotonic() + STACKS_S
        while len(self._stacks) < len(self._peers.keys() - self._reports.keys()) and time.monotonic() < until:
            time.sleep(0.02)
            self.hear(running)
        return {rank: stack for stacks in self._stacks.values() for rank, stack in stacks.items()}

    def announce(self, ended: Ended, patience_s: float) -> None:
        """Tell all nodes how it ended, and let them go first, but not for ever."""
        for node, peer in self._peers.items():
            code = exit_code_of(ended, range(node * self._size, (node + 1) * self._size))
            self._line.send(peer, "verdict", exit_code=code, rank=ended.rank, error=ended.error)
        there, until = set(self._peers.values()), time.monotonic() + patience_s
        there -= {self._peers[node] for node, report in self._reports.items() if report.lost is not None}
        while there and time.monotonic() < until:
            there -= {message.peer for message in self._line.receive() if message.kind == GONE}
            time.sleep(0.02)


class Follower:
    """The view of every other node: it reports, and does what the first one says."""

    def __init__(self, line: Lifeline):
        self._line = line
        self._verdict: Ended | None = None
        self._gone: str | None = None
        self._reported_at: float | None = None
        self._told_at = 0.0
        self._stop: signal.Signals | None = None

    def hear(self, running: Running) -> None:
        for message in self._line.receive():
            facts = message.facts
            match message.kind:
                case "verdict":
                    self._verdict = Ended(facts["exit_code"], facts["rank"], facts["error"])
                case "stop":
                    running.launch.stop.ask(signal.Signals(facts["number"]))
                case "stacks":
                    stacks = [(rank, stack.stopped, stack.frames) for rank, stack in running.own_stacks().items()]
                    self._line.send(0, "stacks", stacks=stacks)
                case "gone":
                    self._gone = facts["why"]
                case _:
                    pass
        stop = running.launch.stop.received
        if stop != self._stop and stop is not None:
            self._stop = stop
            self._line.send(0, "stop", number=stop)

    def decide(self, running: Running, own: Report | None) -> Ended | None:
        """What the first node said; alone only where that one is gone."""
        now = time.monotonic()
        self._tell(running, own, now)
        if self._verdict is not None:
            return self._verdict
        if self._gone is not None:
            if own is not None and not any(own.codes.values()) and is_finished(running.folder):
                return Ended(0)
            first = Report({}, lost=self._gone)
            return judge({0: first} if own is None else {0: first, 1: own})
        late = self._reported_at is not None and now - self._reported_at > VERDICT_S
        return judge({1: own}) if own is not None and own.failed and late else None

    def _tell(self, running: Running, own: Report | None, now: float) -> None:
        if own is not None and self._reported_at is None:
            self._reported_at = now
            self._line.send(0, "report", signs=signs_as_facts(running.own_signs(), now), **own.facts())
        elif own is None and now - self._told_at > BEAT_S:
            self._told_at = now
            self._line.send(0, "signs", signs=signs_as_facts(running.own_signs(), now))


def signs_as_facts(signs: Mapping[int, Sign], now: float) -> list[list[Any]]:
    """With the seconds of silence instead of a time that other machines do not know."""
    return [[rank, sign.pid, sign.phase, sign.step, now - sign.t, sign.beats] for rank, sign in signs.items()]


def signs_from(facts: list[list[Any]]) -> dict[int, Sign]:
    now = time.monotonic()
    return {rank: Sign(pid, phase, step, now - silent_s, beats) for rank, pid, phase, step, silent_s, beats in facts}
