"""The launcher of one node of a run on several: it starts the node's ranks once and ends with their exit code.

Its cluster starts it again. Node 0 decides which attempt it is, hosts the store, judges failures and writes the record.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from orchestrator.bundle import imported_code, load_bundle, write_bundle
from orchestrator.cluster import local, route
from orchestrator.cluster.asked import Asked
from orchestrator.cluster.attempt import POLL_S, Launch, Running, start_ranks
from orchestrator.cluster.cause import Ended
from orchestrator.cluster.environment import Node, leave_last_words
from orchestrator.cluster.group import Place
from orchestrator.cluster.journal import Journal
from orchestrator.cluster.life import Life, kept
from orchestrator.cluster.lifeline import Lifeline
from orchestrator.cluster.meeting import LIFELINE_OFFSET, Hello, Met, Patience, gather, holding, hosting, reach
from orchestrator.cluster.peers import First, Follower, exit_code_of, report_of
from orchestrator.cluster.places import device_of, processes_here
from orchestrator.cluster.record import conclude, is_finished, warning_of_other_code
from orchestrator.cluster.record_place import open_record
from orchestrator.cluster.restarts import Attempt, final_end, read_attempts
from orchestrator.cluster.speaker import FactTeller, LogTail, Speaker, facts_of
from orchestrator.cluster.stops import StopSignals
from orchestrator.cluster.watch import steps_done
from orchestrator.errors import (
    EXIT_DONE,
    ConfigError,
    OrchestratorError,
    StopRequested,
    TransientError,
    UserError,
)
from orchestrator.files import remove_halves
from orchestrator.train.orders import Orders, orders_file

READS_LOGS = {"LAUNCHER_READS_LOGS": "1"}
"""Ranks say to their logs alone what they would say on a terminal: the launcher prints those."""


def run_node(
    node: Node, path: Path, entry: Callable[..., None], out: IO[bytes], stop: StopSignals, began: float
) -> int:
    """The launcher as a process; returns its exit code, leaves the reason where the cluster looks for it."""
    speaker = Speaker(out, node.rank)
    logging.getLogger("orchestrator").addHandler(speaker)
    life, run_id = None, None
    try:
        sent = load_bundle(path)
        run_id = sent.run_id
        life = Life(node, sent, *open_record(sent, path, node.rank), entry, speaker, stop, began)
        ended = live(life)
    except StopRequested as request:
        ended = Ended(request.exit_code)
    except OrchestratorError as error:
        ended = Ended(error.exit_code, None, str(error))
    except Exception as error:
        ended = Ended(1, None, f"{type(error).__name__}: {error}", traceback.format_exc())
    if life is not None:
        ended = kept(life, ended)
        life.record.close()
    where = "" if ended.rank is None else f"rank {ended.rank}: "
    if ended.error:
        speaker.say(f"{ended.traceback or ''}error: {where}{ended.error}")
    facts = {"run_id": run_id, "attempt": life.attempt if life else 0, "node": node.rank, "rank": ended.rank}
    facts |= {"exit_code": ended.exit_code, "error": ended.error, "step": life.step if life else 0}
    leave_last_words(node.termination_log, facts)
    return ended.exit_code


def live(life: Life) -> Ended:
    """Take part in the next attempt from start to end. Raises OrchestratorError for what keeps it from starting."""
    config, node = life.bundle.config, life.node
    _require_same(life)
    local.warm_up(None)
    processes = processes_here(config.compute, node.count)
    own = Hello(
        life.bundle.run_id, life.bundle.code_digest, node.count, device_of(config.compute, processes), node.rank
    )
    asked = Asked(node.ask_file, life.speaker, node.rank)
    patience = Patience(life.stop, config.cluster.hang_start_s, lambda: asked.answer(life.folder, 0, {}))
    if life.record.is_finished():
        ended = _finished(life)
    elif node.rank == 0:
        ended = _lead(life, own, processes, patience, asked)
    else:
        over = life.record.is_finished
        met = reach(own, over, node.address, node.port + LIFELINE_OFFSET, patience, life.resolve)
        ended = _finished(life) if met is None else _join(life, met, processes, asked)
    return ended


def _finished(life: Life) -> Ended:
    life.speaker.say(f"run {life.bundle.run_id} is already finished")
    return Ended(EXIT_DONE)


def _require_same(life: Life) -> None:
    """Refuse code and a number of nodes that are not the bundle's."""
    code, nodes = imported_code(), life.bundle.config.compute.num_nodes
    if code != life.bundle.code_digest:
        raise UserError(
            f"this node imported code {code[:12]}, and the run was submitted with {life.bundle.code_digest[:12]}. Way "
            "out: submit again from a checkout whose code the image has (cluster.code=image), or send it "
            "(cluster.code=archive)"
        )
    if life.node.count != nodes:
        raise ConfigError("compute.num_nodes", nodes, f"but NUM_NODES says {life.node.count}", "submit the run again")


def _lead(life: Life, own: Hello, processes: int, patience: Patience, asked: Asked) -> Ended:
    """What node 0 does: everything that happens once a run."""
    from orchestrator.train.earlier import tell_earlier
    from orchestrator.train.preflight import check_run

    bundle = life.bundle
    sets = check_run(bundle.config, processes * own.num_nodes, processes)
    with holding(life.folder, patience):
        life.record.claim()
        if is_finished(life.folder):
            return _finished(life)
        for notice in filter(None, (warning_of_other_code(bundle), tell_earlier(bundle))):
            life.speaker.say(notice)
        write_bundle(life.sent, life.folder / "run.json", sets.facts())
        failed = _try_first(life, processes)
        try:
            ended = failed or _lead_all(life, own, processes, patience, asked)
        except StopRequested as stop:
            ended = Ended(stop.exit_code)
        except TransientError as error:
            ended = Ended(error.exit_code, None, str(error))
        remove_halves(life.folder)
        if missing := conclude(bundle, ended):
            life.speaker.say(missing)
    return failed or _for_node(ended, range(processes))


def _try_first(life: Life, processes: int) -> Ended | None:
    """How the run ends where the canary of its first attempt fails on this node alone."""
    from orchestrator.cluster.first_node import try_alone

    if life.node.count == 1 or not life.bundle.config.cluster.canary or local.next_attempt(life.folder) > 1:
        return None
    return try_alone(life.bundle, processes, processes * life.node.count, life.speaker.say)


def _lead_all(life: Life, own: Hello, processes: int, patience: Patience, asked: Asked) -> Ended:
    with hosting(life.node.port) as line:
        nodes = gather(line, own, patience)
        return _lead_attempt(life, line, nodes, Place(processes, life.node.port, 0, own.num_nodes), asked)


def _lead_attempt(life: Life, line: Lifeline, nodes: dict[int, int], place: Place, asked: Asked) -> Ended:
    number, folder = local.next_attempt(life.folder), life.folder
    address = next((line.own_address(peer) for peer in nodes.values()), None)
    launch = _launch(life)
    life.record.begin(number, place.ranks)
    Orders(orders_file(folder, number), launch.deadline)
    facts = {"world_size": place.world_size, "num_nodes": place.num_nodes, "began": round(life.began, 3)}
    launch.journal.write("launch", number, argv0="node", **facts)
    first = First(line, nodes, place.local_world_size)
    first.tell_all("go", attempt=number)
    running = start_ranks(launch, number, place, _rank_env(address))
    running.stacks_elsewhere = lambda: first.stacks(running)
    with _telling(life, running):
        ended = _over_lives(running, _follow(life, running, first, asked))
        if ended.exit_code == EXIT_DONE:  # before anybody hears that all is done, all has to be kept
            ended = kept(life, ended)
        first.announce(ended, life.record.hang_up_s)
        launch.journal.write("end", number, exit_code=ended.exit_code)
        kept(life, ended)
    return ended


def _join(life: Life, met: Met, processes: int, asked: Asked) -> Ended:
    """What every other node does."""
    place = Place(processes, life.node.port, life.node.rank, life.node.count, met.address)
    life.record.join(met.attempt, place.ranks)
    running = start_ranks(_launch(life), met.attempt, place, _rank_env(met.line.own_address(0)))
    with _telling(life, running):
        ended = _follow(life, running, Follower(met.line), asked)
        kept(life, ended)  # the first node reports on all ranks once this one has hung up
        met.line.close()
    return ended


def _launch(life: Life) -> Launch:
    arguments = (str(life.path),)
    return Launch(life.bundle, life.entry, arguments, life.node.port, Journal(life.folder), life.stop, life.began)


def _rank_env(address: str | None) -> dict[str, str]:
    """`address`: of this node as the others reach it; None where there are no others."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or (route.interface_of(address) if address else route.LOOPBACK)
    return {**READS_LOGS, **({"GLOO_SOCKET_IFNAME": interface} if interface else {})}


def _follow(life: Life, running: Running, peers: First | Follower, asked: Asked) -> Ended:
    """From the start of the ranks to the end of all of them."""
    report = None
    try:
        while True:
            codes = running.group.poll(POLL_S)
            peers.hear(running)
            report = report or report_of(running, codes)
            ended = peers.decide(running, report)
            if ended is not None:
                return ended
            asked.answer(running.folder, running.number, running.group.pids)
            life.record.check()
    finally:
        running.group.end()


def _over_lives(running: Running, ended: Ended) -> Ended:
    """43 where earlier lives of the launcher ended in the same way at the same step."""
    if not ended.error:
        return ended
    signs = running.signs()
    step = signs[ended.rank].step if ended.rank in signs else steps_done(signs)
    earlier = [event for event in running.launch.journal.read() if event["attempt"] != running.number]
    return final_end([*read_attempts(earlier), Attempt(ended, step)]) or ended


def _for_node(ended: Ended, ranks: range) -> Ended:
    return Ended(exit_code_of(ended, ranks), ended.rank, ended.error, ended.traceback)


@contextmanager
def _telling(life: Life, running: Running) -> Iterator[None]:
    """Print the logs of the ranks, and on node 0 where the run stands, to the last line."""
    number, folder, speaker = running.number, running.folder, life.speaker
    life.attempt = number
    speaker.begin(number)
    logs = folder / "logs" / f"attempt_{number}"
    told: list[LogTail | FactTeller] = [
        LogTail(speaker, {rank: logs / f"rank_{rank}.log" for rank in running.place.ranks}, number)
    ]
    if running.place.node == 0:
        told.append(FactTeller(speaker, lambda: facts_of(folder, number, steps_done(running.signs()))))
    try:
        yield
    finally:
        life.step = steps_done(running.signs())
        for teller in told:
            teller.end()
