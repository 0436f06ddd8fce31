"""Lines of all ranks, each once, whatever becomes of connections, pods and log files."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import pytest
from fake_api import FakeApi, Log
from objects import LABELS, RUN_ID, pod

from orchestrator.cluster.backend import LogLine
from orchestrator.cluster.kubernetes import follow, logs
from orchestrator.cluster.kubernetes.api import Api
from orchestrator.cluster.kubernetes.failures import Forbidden
from orchestrator.cluster.kubernetes.follow import Follower
from orchestrator.cluster.kubernetes.logs import Joiner, PodLog, read_ended
from orchestrator.cluster.lines import Numbered
from orchestrator.errors import TransientError

CORE = "/api/v1"
LABEL = f"orchestrator/run={LABELS['orchestrator/run']}"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "PAUSE_S", 0.01)
    monkeypatch.setattr(follow, "PAUSE_S", 0.05)
    monkeypatch.setattr(follow, "LOOK_S", 0.1)


class Run:
    """Pods on a fake cluster that print as launchers do."""

    def __init__(self, server: FakeApi):
        self.server = server
        self.over = False

    def start(self, index: int, suffix: str = "aaaaa") -> Log:
        made = self.server.put(CORE, "pods", pod(index, suffix=suffix))
        return self.server.log(made["metadata"]["name"])

    def end(self, index: int, suffix: str = "aaaaa", phase: str = "Succeeded") -> None:
        name = f"{RUN_ID}-{index}-{suffix}"
        self.server.log(name).end()
        self.server.put(CORE, "pods", {**self.server.objects[CORE, "default", "pods", name],
                                       "status": pod(index, phase, state={"terminated": {}})["status"]})  # fmt: skip

    def follower(self, api: Api, rank: int | None = None) -> Iterator[LogLine]:
        return Follower(api, LABEL, Joiner(rank)).lines(lambda: self.over)


@pytest.fixture
def run(server: FakeApi) -> Run:
    return Run(server)


def said(attempt: int, rank: int, *numbers: int) -> list[str]:
    return [f"[a{attempt} r{rank} #{number}] line {number} of {rank}" for number in numbers]


def keys(lines: Iterator[LogLine] | list[LogLine]) -> list[tuple[int, int | None, int]]:
    return [(line.attempt, line.rank, line.number) for line in lines]


def test_ended_pods_are_joined_by_attempt_and_then_as_they_came(server: FakeApi, api: Api, run: Run) -> None:
    later = run.start(0, "later")
    first = run.start(0, "first")
    other = run.start(1, "first")
    first.write("a launcher that begins", *said(1, 0, 1))
    other.write(*said(1, 1, 1))
    first.write(*said(1, 0, 2))
    later.write(*said(2, 0, 1), "[a2 n0 progress] {}")
    pods = api.list(logs.POD, LABEL)[0]
    assert keys(read_ended(api, pods, Joiner())) == [(1, None, 1), (1, 0, 1), (1, 1, 1), (1, 0, 2), (2, 0, 1)]
    assert keys(read_ended(api, pods, Joiner(1))) == [(1, 1, 1)]


def test_a_long_line_comes_back_whole_and_as_it_was(server: FakeApi, api: Api, run: Run) -> None:
    text = "ä" * 9000 + "\r [a1 r1 #1] no prefix of ours"
    run.start(0).write(*Numbered(1, "r0").feed(text.encode() + b"\n").split("\n")[:-1])
    (line,) = read_ended(api, api.list(logs.POD, LABEL)[0], Joiner())
    assert line == LogLine(1, 0, 1, text)


def test_a_gap_is_said_aloud(server: FakeApi, api: Api, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    log = run.start(0)
    log.write(*said(1, 3, 1, 2))
    log.rotate()
    log.write(*said(1, 3, 3))
    with caplog.at_level(logging.WARNING):
        assert keys(read_ended(api, api.list(logs.POD, LABEL)[0], Joiner())) == [(1, 3, 3)]
    assert "lines 1 to 2 of r3 in attempt 1 are gone from the node: logs/attempt_1/rank_3.log" in caplog.text


def test_pods_are_followed_as_they_are_replaced(server: FakeApi, api: Api, run: Run) -> None:
    first, other = run.start(0), run.start(1)
    got: list[LogLine] = []
    reader = threading.Thread(target=lambda: got.extend(run.follower(api)))
    first.write(*said(1, 0, 1))
    reader.start()
    other.write(*said(1, 1, 1))
    first.write(*said(1, 0, 2))
    run.end(0, phase="Failed")
    run.start(0, "bbbbb").write(*said(2, 0, 1))
    time.sleep(0.2)
    run.end(1)
    run.end(0, "bbbbb")
    run.over = True
    reader.join(10)
    assert sorted(keys(got)) == [(1, 0, 1), (1, 0, 2), (1, 1, 1), (2, 0, 1)]


def test_a_pod_that_was_there_only_for_a_moment_at_the_end_is_read(server: FakeApi, api: Api, run: Run) -> None:
    lines = run.follower(api)
    run.start(0).write(*said(1, 0, 1))
    assert next(lines).number == 1
    run.start(1).write(*said(1, 1, 1))
    run.end(0)
    run.end(1)
    run.over = True
    assert keys(lines) == [(1, 1, 1)]


def test_pods_that_no_watch_told_of_are_read_at_the_end(server: FakeApi, api: Api, run: Run) -> None:
    follower = Follower(api, LABEL, Joiner())
    follower._find = lambda pods, version: None
    lines = follower.lines(lambda: True)
    threading.Timer(0.02, lambda: run.start(0).write(*said(1, 0, 1))).start()
    threading.Timer(0.04, run.end, (0,)).start()
    assert keys(lines) == [(1, 0, 1)]


def test_a_stream_that_ends_while_its_container_lives_is_opened_again(server: FakeApi, api: Api, run: Run) -> None:
    log = run.start(0)
    log.write(*said(1, 0, 1))
    log.end()
    lines = run.follower(api)
    assert next(lines).number == 1
    log.ended = False
    log.write(*said(1, 0, 2))
    assert next(lines).number == 2
    run.end(0)
    run.over = True
    assert list(lines) == []


def test_broken_connections_lose_and_repeat_nothing(server: FakeApi, api: Api, run: Run) -> None:
    log = run.start(0)
    server.cut_logs = [1, 3, 7, 50, 400]
    writer = threading.Thread(target=write_slowly, args=(log, run, 1000))
    writer.start()
    assert keys(run.follower(api)) == [(1, 0, number) for number in range(1, 1001)]
    writer.join()
    assert server.cut_logs == []


def write_slowly(log: Log, run: Run, count: int) -> None:
    for number in range(1, count + 1):
        log.write(*said(1, 0, number))
        if number % 100 == 0:
            time.sleep(0.02)
    run.end(0)
    run.over = True


def test_lines_with_one_time_stamp_and_out_of_order_are_told_apart(server: FakeApi, api: Api, run: Run) -> None:
    log = run.start(0)
    run.end(0)
    stamps = ["00:01.5", "00:01.5", "00:01.5", "00:02.1", "00:01.9", "00:02.1", "00:02.2"]
    log.lines = [(f"2026-01-01T10:{stamp}Z", text) for stamp, text in zip(stamps, "aabcdcc", strict=True)]
    the_pod = server.objects[CORE, "default", "pods", f"{RUN_ID}-0-aaaaa"]
    whole = list(PodLog(api, the_pod).read())
    assert [text for _, text in whole] == list("aabcdcc")
    for cut in range(1, 7):
        server.cut_logs = [cut, 1]
        assert list(PodLog(api, the_pod).follow()) == whole


def test_a_server_that_is_away_for_a_while_is_waited_for(
    server: FakeApi, api: Api, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    log = run.start(0)
    lines = run.follower(api)
    log.write(*said(1, 0, 1))
    assert next(lines).number == 1
    server.down = True
    server.break_off()
    log.write(*said(1, 0, 2))
    with caplog.at_level(logging.INFO):
        time.sleep(0.3)
    server.down = False
    assert next(lines).number == 2
    assert "trying again" in caplog.text
    run.end(0)
    run.over = True
    assert list(lines) == []


def test_patience_ends(server: FakeApi, api: Api, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "PATIENCE_S", 0.0)
    monkeypatch.setattr(logs, "SILENCE_S", 0.1)
    run.start(0).write(*said(1, 0, 1))
    lines = run.follower(api)
    next(lines)
    server.down = True
    server.break_off()
    with pytest.raises(TransientError, match="does not answer"):
        list(lines)


def test_a_watch_from_too_long_ago_lists_again(server: FakeApi, api: Api, run: Run) -> None:
    server.oldest = 10**6
    lines = run.follower(api)
    threading.Timer(0.1, lambda: run.start(0).write(*said(1, 0, 1))).start()
    assert next(lines).number == 1
    lines.close()


def test_a_missing_right_is_named(server: FakeApi, api: Api, run: Run) -> None:
    server.denied = {("get", "pods/log")}
    run.start(0)
    with pytest.raises(Forbidden, match="no right to get pods/log"):
        list(run.follower(api))
    server.denied = {("watch", "pods")}
    with pytest.raises(Forbidden, match="no right to watch pods"):
        list(run.follower(api))


def test_a_reader_that_stops_leaves_no_thread(server: FakeApi, api: Api, run: Run) -> None:
    before = {thread.ident for thread in threading.enumerate()}
    run.start(0).write(*said(1, 0, 1))
    run.start(1)
    lines = run.follower(api)
    next(lines)
    lines.close()
    time.sleep(0.3)
    ours = [
        thread
        for thread in threading.enumerate()
        if thread.ident not in before and "process_request" not in thread.name
    ]
    assert ours == []


def test_many_pods_at_once(server: FakeApi, api: Api, run: Run) -> None:
    for index in range(24):
        run.start(index).write(*said(1, index, *range(1, 201)))
    lines = run.follower(api)
    got = [next(lines) for _ in range(24 * 200)]
    assert sorted(keys(got)) == [(1, rank, number) for rank in range(24) for number in range(1, 201)]
    for index in range(24):
        run.end(index)
    run.over = True
    assert list(lines) == []


def test_the_log_of_a_failed_init_container_is_read(server: FakeApi, api: Api, run: Run) -> None:
    failed = {"name": "code", "state": {"terminated": {"exitCode": 42}}}
    made = server.put(CORE, "pods", pod(0, "Failed", state={}, initContainerStatuses=[failed]))
    server.log(made["metadata"]["name"]).write("the archive is another one")
    assert keys(read_ended(api, api.list(logs.POD, LABEL)[0], Joiner())) == [(0, None, 1)]
    assert "container=code" in server.queries[-1]
