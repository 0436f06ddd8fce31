"""How the launchers of a run's nodes find each other before an attempt: patiently, since pods come one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.cluster import lifeline
from orchestrator.cluster.lifeline import GONE, Lifeline, Message
from orchestrator.cluster.lock import AlreadyRunning, only_writer
from orchestrator.cluster.stops import StopSignals
from orchestrator.errors import EXIT_USER, NodeError, StopRequested, TransientError, UserError

NAP_S = 0.05
RETRY_S = 1.0
LIFELINE_OFFSET = 1
"""The lifeline's port is the next one after the store's."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What a node says of itself; all but its number must be what node 0 has."""

    run_id: str
    code_digest: str
    num_nodes: int
    device: str
    node: int


@dataclass(slots=True)
class Patience:
    """How long a node waits for the others, and what ends the wait."""

    stop: StopSignals
    limit_s: float
    idle: Callable[[], None] = lambda: None
    """Called while it waits."""
    began: float = 0.0

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    def wait(self, what: str, seconds: float) -> None:
        """A moment. Raises StopRequested, or TransientError which says that `what` did not come."""
        until = time.monotonic() + seconds
        while True:
            if self.stop.exit_code is not None:
                raise StopRequested("stopped before the ranks were started", self.stop.exit_code)
            if time.monotonic() - self.began > self.limit_s:
                raise TransientError(f"{what} within cluster.hang_start_s = {self.limit_s:g}")
            self.idle()
            if time.monotonic() >= until:
                return
            time.sleep(NAP_S)


def gather(line: Lifeline, own: Hello, patience: Patience) -> dict[int, int]:
    """Node 0 waits for all others; returns their connections by node."""
    nodes: dict[int, int] = {}
    while len(nodes) < own.num_nodes - 1:
        for message in line.receive():
            _greet(line, own, nodes, message)
        missing = sorted(set(range(1, own.num_nodes)) - nodes.keys())
        if missing:
            patience.wait(f"nodes {', '.join(map(str, missing))} did not come", NAP_S)
    return nodes


def _greet(line: Lifeline, own: Hello, nodes: dict[int, int], message: Message) -> None:
    if message.kind == GONE:
        for node in [node for node, peer in nodes.items() if peer == message.peer]:
            del nodes[node]  # its next life will come
        return
    node = message.facts.get("node")
    refusal = refuse(asdict(own), message.facts) if message.kind == "hello" else (EXIT_USER, "it is no launcher")
    if refusal is not None:
        line.send(message.peer, "refused", exit_code=refusal[0], error=refusal[1])
    elif isinstance(node, int) and 0 < node < own.num_nodes:
        if node in nodes:
            line.drop(nodes[node])
        nodes[node] = message.peer


def refuse(own: dict[str, Any], other: dict[str, Any]) -> tuple[int, str] | None:
    """Why a node must not take part, and the exit code that says so."""
    for key in ("run_id", "num_nodes", "code_digest"):
        if other.get(key) != own[key]:
            return EXIT_USER, (
                f"node {other.get('node')} has {key} = {other.get(key)} and node 0 has {own[key]}. "
                "Way out: submit the run again"
            )
    if other.get("device") != own["device"]:
        fault = other if other.get("device") == "cpu" else own
        return NodeError.exit_code, f"node {fault['node']} sees no GPU, and another node of the run does"
    return None


@dataclass(frozen=True, slots=True)
class Met:
    """What a node knows once node 0 has let it go on."""

    line: Lifeline
    address: str
    """Of node 0."""
    attempt: int


def reach(
    own: Hello, is_over: Callable[[], bool], name: str, port: int, patience: Patience, resolve: lifeline.Resolver
) -> Met | None:
    """Another node looks for node 0 until it may go on; None where the run turns out to be finished."""
    while not is_over():
        try:
            address = resolve(name)
            line = lifeline.connect(address, port)
        except OSError as error:
            reason = error.strerror or error
            patience.wait(f"node 0 did not come to MASTER_ADDR = {name}, port {port} ({reason})", RETRY_S)
            continue
        line.send(0, "hello", **asdict(own))
        attempt = _await_go(line, patience)
        if attempt is not None:
            return Met(line, address, attempt)
        line.close()
        patience.wait("node 0 did not stay", RETRY_S)
    return None


def _await_go(line: Lifeline, patience: Patience) -> int | None:
    """The number of the attempt; None where node 0 has gone, whose next life will come."""
    while True:
        for message in line.receive():
            if message.kind == "go":
                return message.facts["attempt"]
            if message.kind == "refused":
                kinds = {UserError.exit_code: UserError, NodeError.exit_code: NodeError}
                raise kinds[message.facts["exit_code"]](message.facts["error"])
            if message.kind == GONE:
                return None
        patience.wait("the other nodes did not come", NAP_S)


@contextmanager
def holding(folder: Path, patience: Patience) -> Iterator[None]:
    """The run's lock, waited for: a network disk keeps that of a lost node for a while."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(only_writer(folder))
                break
            except AlreadyRunning:
                patience.wait(f"run {folder.name} is running elsewhere, which did not end", RETRY_S)
        yield


@contextmanager
def hosting(port: int) -> Iterator[Lifeline]:
    """The store of the ranks and the lifeline of the launchers."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    try:
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        line = lifeline.listen(port + LIFELINE_OFFSET)
    except (OSError, RuntimeError) as error:
        raise TransientError(f"MASTER_PORT = {port}: it or the next port cannot be used here ({error})") from None
    try:
        yield line
    finally:
        line.close()
        del store
