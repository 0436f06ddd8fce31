"""Logs across restarts, and what a machine answers about the runs in a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cluster.backend import LogLine
from orchestrator.cluster.local_backend import LocalBackend, rank_pids
from orchestrator.cluster.lock import only_writer
from orchestrator.cluster.rank_logs import attempts_of, read_logs
from orchestrator.errors import UserError
from orchestrator.train.heartbeat import Heartbeat, heartbeat_file
from orchestrator.train.stacks import stacks_file


def write_log(folder: Path, attempt: int, rank: int, text: str) -> Path:
    path = folder / "logs" / f"attempt_{attempt}" / f"rank_{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(text)
    return path


def ended() -> bool:
    return False


def told(lines: list[LogLine]) -> list[tuple[int, int | None, int, str]]:
    return [(line.attempt, line.rank, line.number, line.text) for line in lines]


def never(folder: Path) -> int:
    raise AssertionError("nothing starts")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "small-0123abcd"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    return run


@pytest.fixture
def backend(folder: Path) -> LocalBackend:
    return LocalBackend(folder.parent, never)


def test_earlier_attempts_come_first_and_ranks_are_put_in_order_by_time(folder: Path) -> None:
    at = "2026-11-24 10:00:0{},000 INFO x: {}\n".format
    write_log(folder, 10, 0, "last\n")
    write_log(folder, 2, 0, at(1, "a") + "Traceback\n" + at(4, "d"))
    write_log(folder, 2, 1, at(2, "b") + at(3, "c"))
    lines = list(read_logs(folder, None, ended))
    assert [line.text[-1] for line in lines] == list("akbcdt")
    assert told(lines)[1] == (2, 0, 2, "Traceback")
    assert attempts_of(folder) == [2, 10]


def test_one_rank_alone_a_line_without_an_end_and_bytes_that_are_no_text(folder: Path) -> None:
    write_log(folder, 1, 0, "zero\n")
    path = write_log(folder, 1, 1, "")
    path.write_bytes("\u00e4\r\x85\u2028 \n\n".encode() + b"\xff\xfe torn")
    assert told(list(read_logs(folder, 1, ended))) == [
        (1, 1, 1, "\u00e4\r\x85\u2028 "), (1, 1, 2, ""), (1, 1, 3, "\ufffd\ufffd torn")
    ]  # fmt: skip


def follow(folder: Path, write: Callable[[], None]) -> list[LogLine]:
    """What is read while `write` writes, and at its end."""
    writer = threading.Thread(target=write)
    writer.start()
    found = list(read_logs(folder, None, writer.is_alive))
    writer.join()
    return found


def test_following_loses_and_doubles_nothing_while_attempts_begin_and_end_in_the_middle_of_lines(folder: Path) -> None:
    def write() -> None:
        for attempt in (1, 2, 3):
            logs = [write_log(folder, attempt, rank, "") for rank in (0, 1)]
            files = [open(path, "a", buffering=1 << 14) for path in logs]  # noqa: SIM115
            for number in range(4000):
                for rank, file in enumerate(files):
                    file.write(f"{attempt} {rank} {number} " + "x" * (number % 50) + "\n")
                if number % 500 == 0:
                    time.sleep(0.02)
            for file in files:
                file.write("torn")
                file.close()

    lines = follow(folder, write)
    for attempt in (1, 2, 3):
        for rank in (0, 1):
            own = [line for line in lines if (line.attempt, line.rank) == (attempt, rank)]
            assert [line.number for line in own] == list(range(1, 4002))
            assert [line.text.split(" x")[0].strip() for line in own[:-1]] == [
                f"{attempt} {rank} {n}" for n in range(4000)
            ]
            assert own[-1].text == "torn"
    assert [line.attempt for line in lines] == sorted(line.attempt for line in lines)


def test_ten_thousand_lines_a_second_are_followed_without_falling_behind(folder: Path) -> None:
    seconds, rate = 2.0, 10_000

    def write() -> None:
        with open(write_log(folder, 1, 0, ""), "a", buffering=1) as file:
            began = time.monotonic()
            for number in range(int(seconds * rate)):
                if number % 100 == 0:
                    time.sleep(max(0.0, began + number / rate - time.monotonic()))
                file.write(f"{time.monotonic():.6f} line {number}\n")

    writer = threading.Thread(target=write)
    writer.start()
    read = read_logs(folder, None, writer.is_alive)
    behind = [time.monotonic() - float(line.text.split()[0]) for line in read]
    assert len(behind) == seconds * rate
    assert sorted(behind)[len(behind) // 2] < 0.5


def test_a_line_that_grows_is_told_once_and_whole(folder: Path) -> None:
    def write() -> None:
        for piece in ("be", "gun ", "\u00e4", " ended\nnext"):
            write_log(folder, 1, 0, piece)
            time.sleep(0.15)

    assert [line.text for line in follow(folder, write)] == ["begun \u00e4 ended", "next"]


def test_a_run_that_does_not_run_is_neither_cancelled_nor_looked_into(backend: LocalBackend, folder: Path) -> None:
    for ask in (lambda: backend.cancel(folder.name, False), lambda: backend.stacks(folder.name)):
        with pytest.raises(
            UserError, match=r"small-0123abcd is not running here \(dead\). Way out: orchestrator status"
        ):
            ask()


def test_a_run_that_runs_is_neither_removed_nor_started_again(backend: LocalBackend, folder: Path) -> None:
    with only_writer(folder):
        with pytest.raises(UserError, match=rf"running as process {os.getpid()}. Way out: orchestrator cancel small"):
            backend.remove(folder.name)
        with pytest.raises(UserError, match=rf"running as process {os.getpid()}. Way out: orchestrator logs small"):
            backend.resume(folder.name)
    assert folder.exists()


def test_what_is_removed_is_gone_and_what_is_here_is_not_pulled(backend: LocalBackend, folder: Path) -> None:
    with pytest.raises(UserError, match=f"is on this machine: {folder}"):
        backend.pull(folder.name, folder.parent)
    backend.remove(folder.name)
    assert not folder.exists()
    with pytest.raises(UserError, match="there is none at all Way out: orchestrator ls"):
        backend.remove(folder.name)


def test_an_unknown_id_gets_the_nearest_one(backend: LocalBackend) -> None:
    with pytest.raises(UserError, match="did you mean 'small-0123abcd'"):
        backend.status("small-0123abce")


RANK = """
import sys, time
from pathlib import Path
from orchestrator.train.heartbeat import Heartbeat, heartbeat_file
from orchestrator.train.stacks import stacks_file, tell_stacks
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
file = tell_stacks(stacks_file(folder, 1, rank))
beat = Heartbeat(heartbeat_file(folder, 1, rank))
def waits_for_the_test():
    print("ready", flush=True)
    time.sleep(60)
waits_for_the_test()
"""


def start_rank(folder: Path, rank: int) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", RANK, str(folder), str(rank)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_stacks_of_living_ranks_name_the_place_and_a_stopped_rank_stays_stopped(
    backend: LocalBackend, folder: Path
) -> None:
    ranks = [start_rank(folder, rank) for rank in (0, 1)]
    try:
        os.kill(ranks[1].pid, signal.SIGSTOP)
        with only_writer(folder):
            stacks = backend.stacks(folder.name)
        assert stacks[0].splitlines()[0] == "<string>:11 in waits_for_the_test"
        assert stacks[1] == f"stopped by a signal, so it does not answer; `kill -CONT {ranks[1].pid}` lets it go on"
        assert "T" in Path(f"/proc/{ranks[1].pid}/stat").read_text().split()[2]
        assert ranks[0].poll() is None
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_a_process_that_only_got_the_number_of_a_rank_is_not_sent_a_signal(folder: Path) -> None:
    Heartbeat(heartbeat_file(folder, 1, 0))
    stacks_file(folder, 1, 0).touch()
    assert rank_pids(folder, 1) == {}
