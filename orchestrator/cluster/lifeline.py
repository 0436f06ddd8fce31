"""The connection between the launchers of a run's nodes: who is there, who is gone, and what they tell each other.

Node 0 listens, the others connect. Each message is a line of JSON; an empty line says that its sender lives. A peer
whose connection ends, or that is silent for SILENCE_S, is gone. A thread does all of it, so that a launcher that waits
or writes stays alive to the others, and one that is stopped does not.
"""

from __future__ import annotations

import json
import math
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection as sockets
from typing import Any

BEAT_S = 0.5
LOOK_S = 0.1
SILENCE_S = 8.0
CONNECT_S = 3.0
SEND_S = 5.0
"""How long a peer may let its buffer be full."""
LONGEST = 1 << 20
"""Bytes of a message; what sends more is no launcher."""
GONE = "gone"


@dataclass(frozen=True, slots=True)
class Message:
    """What a peer said, or that it is gone (`kind` GONE, its facts say why)."""

    peer: int
    """Number of the connection, in the order in which they came."""
    kind: str
    facts: dict[str, Any]
    ahead_s: float = 0.0
    """By how much this machine's clock is ahead of the peer's."""


@dataclass(slots=True)
class _Peer:
    number: int
    connection: socket.socket
    heard: float = field(default_factory=time.monotonic)
    buffer: bytes = b""
    ahead_s: float = math.inf
    """The least that a message seemed to take by the two clocks; what it took in truth is little beside that."""
    sending: threading.Lock = field(default_factory=threading.Lock)


class Lifeline:
    """Both ends: with a listening socket it takes what connects, without one it has its only peer from the start."""

    def __init__(self, listener: socket.socket | None = None, connection: socket.socket | None = None):
        self._listener = listener
        self._peers: dict[int, _Peer] = {}
        self._count = 0
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._closing = threading.Event()
        if connection is not None:
            self._add(connection)
        self._thread = threading.Thread(target=self._run, name="lifeline", daemon=True)
        self._thread.start()

    def receive(self) -> list[Message]:
        """What has come since the last call."""
        messages = []
        with suppress(queue.Empty):
            while True:
                messages.append(self._inbox.get_nowait())
        return messages

    def send(self, peer: int, kind: str, **facts: Any) -> None:
        """To a peer that is gone nothing is sent."""
        found = self._peers.get(peer)
        if found is not None:
            self._write(found, json.dumps({"kind": kind, "sent": time.time(), **facts}).encode() + b"\n")

    def own_address(self, peer: int) -> str | None:
        """Of this end of a connection."""
        found = self._peers.get(peer)
        return None if found is None else plain_address(found.connection.getsockname()[0])

    def drop(self, peer: int) -> None:
        """Have no more to do with a peer."""
        found = self._peers.pop(peer, None)
        if found is not None:
            _shut(found.connection)

    def close(self) -> None:
        """What was sent still arrives."""
        self._closing.set()
        self._thread.join(BEAT_S * 4)
        for number in list(self._peers):
            self.drop(number)
        if self._listener is not None:
            self._listener.close()

    def _run(self) -> None:
        beaten = 0.0
        while not self._closing.is_set():
            self._read(LOOK_S)  # first, so that one that was stopped itself hears what came meanwhile
            now = time.monotonic()
            if now - beaten >= BEAT_S:
                beaten = now
                self._beat(now)

    def _beat(self, now: float) -> None:
        for peer in list(self._peers.values()):
            if now - peer.heard > SILENCE_S:
                self._lose(peer, f"silent for {now - peer.heard:.1f} s")
            else:
                self._write(peer, b"\n")

    def _read(self, timeout_s: float) -> None:
        peers = {peer.connection: peer for peer in list(self._peers.values())}
        listeners = [self._listener] if self._listener else []
        try:
            ready = sockets.wait([*listeners, *peers], timeout_s)
        except (OSError, ValueError):  # one of them was dropped just now
            return
        for one in ready:
            with suppress(OSError):
                if self._listener is not None and one is self._listener:
                    self._add(self._listener.accept()[0])
                else:
                    self._hear(peers[one])  # pyright: ignore[reportArgumentType]

    def _hear(self, peer: _Peer) -> None:
        try:
            content = peer.connection.recv(1 << 16)
        except OSError as error:
            self._lose(peer, error.strerror or str(error))
            return
        peer.heard = time.monotonic()
        *lines, peer.buffer = (peer.buffer + content).split(b"\n")
        if not content:
            self._lose(peer, "its connection was closed")
        elif not self._take(peer, lines) or len(peer.buffer) > LONGEST:
            self._lose(peer, "it is no launcher")

    def _take(self, peer: _Peer, lines: list[bytes]) -> bool:
        """Whether these lines are messages."""
        try:
            for line in filter(None, lines):
                facts = json.loads(line)
                peer.ahead_s = min(peer.ahead_s, time.time() - facts.pop("sent"))
                self._inbox.put(Message(peer.number, facts.pop("kind"), facts, peer.ahead_s))
        except (ValueError, KeyError, AttributeError, TypeError):
            return False
        return True

    def _add(self, connection: socket.socket) -> None:
        connection.settimeout(SEND_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[self._count] = _Peer(self._count, connection)
        self._count += 1

    def _write(self, peer: _Peer, content: bytes) -> None:
        try:
            with peer.sending:
                peer.connection.sendall(content)
        except TimeoutError:  # half a message may have gone
            self._lose(peer, f"took nothing for {SEND_S:g} s")
        except OSError:
            return  # reading will show why, after what the peer had still said

    def _lose(self, peer: _Peer, why: str) -> None:
        if self._peers.pop(peer.number, None) is not None:
            _shut(peer.connection)
            self._inbox.put(Message(peer.number, GONE, {"why": why}))


def listen(port: int) -> Lifeline:
    """The end of node 0, on all addresses. Raises OSError where the port is taken."""
    if socket.has_dualstack_ipv6():
        return Lifeline(socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True))
    return Lifeline(socket.create_server(("", port)))


def connect(address: str, port: int) -> Lifeline:
    """The end of another node. Raises OSError where nobody listens yet."""
    return Lifeline(connection=socket.create_connection((address, port), CONNECT_S))


def resolve(name: str) -> str:
    """An address of a host. Raises OSError where nothing has the name yet."""
    return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])


Resolver = Callable[[str], str]


def plain_address(address: str) -> str:
    """An IPv4 address as such where a socket for both kinds shows it as one of IPv6."""
    return address.removeprefix("::ffff:")


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
