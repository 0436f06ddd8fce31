"""The lifeline on loopback: messages, ends, silence, strangers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from launching import REPO, environment, wait_for

from orchestrator.cluster import lifeline, route
from orchestrator.cluster.lifeline import GONE, Lifeline, Message


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def first(port: int) -> Iterator[Lifeline]:
    line = lifeline.listen(port)
    yield line
    line.close()


@pytest.fixture
def other(first: Lifeline, port: int) -> Iterator[Lifeline]:
    line = lifeline.connect("127.0.0.1", port)
    yield line
    line.close()


def heard(line: Lifeline, count: int = 1, timeout_s: float = 5) -> list[Message]:
    messages: list[Message] = []

    def enough() -> bool:
        messages.extend(line.receive())
        return len(messages) >= count

    wait_for(enough, f"{count} messages", timeout_s)
    return messages


def test_both_ends_hear_each_other_in_order(first: Lifeline, other: Lifeline) -> None:
    for number in range(50):
        other.send(0, "count", number=number)
    assert [message.facts["number"] for message in heard(first, 50)] == list(range(50))
    first.send(0, "answer", text="ż\n" * 40_000)  # longer than what one read takes
    (answer,) = heard(other)
    assert (answer.kind, answer.facts) == ("answer", {"text": "ż\n" * 40_000})


def test_the_last_words_of_a_peer_come_before_its_end(first: Lifeline, other: Lifeline) -> None:
    other.send(0, "report", code=42)
    other.close()
    assert [message.kind for message in heard(first, 2)] == ["report", GONE]
    first.send(0, "verdict")  # to nobody, which is no error


def test_the_end_of_node_0_is_seen_by_all_at_once(first: Lifeline, port: int) -> None:
    others = [lifeline.connect("127.0.0.1", port) for _ in range(3)]
    for line in others:
        line.send(0, "hello")
    assert {message.peer for message in heard(first, 3)} == {0, 1, 2}
    began = time.monotonic()
    first.close()
    assert [heard(line)[0].kind for line in others] == [GONE] * 3
    assert time.monotonic() - began < 2
    for line in others:
        line.close()


PEER = """
import sys, time
from orchestrator.cluster import lifeline
line = lifeline.connect("127.0.0.1", int(sys.argv[1]))
line.send(0, "hello")
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "why"), [(signal.SIGKILL, "its connection was closed"), (signal.SIGSTOP, "silent")])
def test_a_process_that_is_killed_or_stopped_is_gone_within_seconds(
    first: Lifeline, port: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, why: str
) -> None:
    monkeypatch.setattr(lifeline, "SILENCE_S", 2.0)
    process = subprocess.Popen([sys.executable, "-c", PEER, str(port)], cwd=REPO, env=environment([]))
    try:
        assert heard(first, timeout_s=30)[0].kind == "hello"
        time.sleep(3)
        assert first.receive() == []  # a peer that says nothing but lives
        os.kill(process.pid, number)
        (message,) = heard(first)
        assert message.kind == GONE
        assert message.facts["why"].startswith(why)
    finally:
        process.kill()
        process.wait()


def test_the_difference_of_two_clocks_is_known_however_late_a_message_is_read(first: Lifeline, other: Lifeline) -> None:
    for sent in (-100.0, -100.5, -99.0):  # by a clock that is 99 s behind, and messages that took up to 1.5 s
        other.send(0, "signs", sent=time.time() + sent)
    time.sleep(0.5)
    assert [message.ahead_s for message in heard(first, 3)] == pytest.approx([100, 100, 99], abs=0.2)


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n\r\n", b"5\n", b"[]\n", b'{"sent": 1}\n', b'{"kind": "hello"}\n', b"x" * (2 << 20)]
)
def test_a_stranger_is_shown_out_and_harms_nobody(first: Lifeline, other: Lifeline, port: int, words: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        with suppress(OSError):
            stranger.sendall(words)
        message = heard(first)[0]
        assert (message.peer, message.kind, message.facts) == (1, GONE, {"why": "it is no launcher"})
    other.send(0, "hello")
    assert heard(first)[0].peer == 0


def test_the_address_and_interface_are_those_on_which_the_nodes_met(first: Lifeline, other: Lifeline) -> None:
    other.send(0, "hello")
    heard(first)
    assert first.own_address(0) == other.own_address(0) == "127.0.0.1"
    assert route.interface_of("127.0.0.1") == route.interface_of("::1") == "lo"
    assert route.interface_of("203.0.113.7") is None
    assert lifeline.plain_address("::ffff:10.1.2.3") == "10.1.2.3"


def test_an_interface_is_found_by_each_of_its_addresses() -> None:
    for _, name in socket.if_nameindex():
        address = route._ipv4(name)
        if address and not address.startswith("127."):
            assert route.interface_of(address) == name
