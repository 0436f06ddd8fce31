"""What the launcher of a node prints of its ranks' logs: everything, quickly, while they are written."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import wait_for

from orchestrator.cluster import speaker
from orchestrator.cluster.lines import Said, read_lines
from orchestrator.cluster.speaker import FactTeller, LogTail, Speaker

WRITER = """
import os, sys
path, count = sys.argv[1], int(sys.argv[2])
file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
for number in range(count):
    os.write(file, b"step %d  loss 0.1234  top-1 56.7%%  1,234 images/s\\n" % number)
os.write(file, b"the last words")
"""


def said(out: io.BytesIO) -> list[Said]:
    return list(read_lines(out.getvalue().decode().split("\n")))


def test_two_ranks_that_write_more_than_ten_thousand_lines_a_second_lose_none(tmp_path: Path) -> None:
    out, count = io.BytesIO(), 50_000
    paths = {rank: tmp_path / f"rank_{rank}.log" for rank in (0, 1)}
    began = time.monotonic()
    tail = LogTail(Speaker(out, 0), paths, 3)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(count)]) for path in paths.values()]
    assert [writer.wait() for writer in writers] == [0, 0]
    tail.end()
    seconds = time.monotonic() - began
    for rank in paths:
        own = [line for line in said(out) if line.rank == rank]
        assert [line.number for line in own] == list(range(1, count + 2))
        assert [own[0].text[:6], own[-2].text[:10], own[-1].text] == ["step 0", "step 49999", "the last words"]
        assert {line.attempt for line in own} == {3}
    assert 2 * count / seconds > 10_000


def test_lines_come_while_they_are_written_and_a_half_one_when_it_ends(tmp_path: Path) -> None:
    out, path = io.BytesIO(), tmp_path / "rank_4.log"
    tail = LogTail(Speaker(out, 1), {4: path}, 1)
    with open(path, "wb", buffering=0) as file:
        file.write(b"one\ntwo")
        wait_for(lambda: [line.text for line in said(out)] == ["one"], "the first line", 5)
        time.sleep(0.3)
        assert [line.text for line in said(out)] == ["one"]
        file.write(b" halves\n")
        wait_for(lambda: [line.text for line in said(out)] == ["one", "two halves"], "the second", 5)
    tail.end()
    assert out.getvalue().decode() == "[a1 r4 #1] one\n[a1 r4 #2] two halves\n"


def test_the_launcher_s_words_and_warnings_are_numbered_from_its_attempt_on() -> None:
    out = io.BytesIO()
    voice = Speaker(out, 1)
    logger = logging.getLogger("orchestrator.cluster.made_up")
    logger.addHandler(voice)
    try:
        voice.say("waits")
        voice.begin(2)
        logger.warning("two\nlines")
        logger.info("not for here")
    finally:
        logger.removeHandler(voice)
    assert out.getvalue().decode() == "[a0 n1 #1] waits\n[a2 n1 #1] two\n[a2 n1 #2] lines\n"


def test_a_reader_that_is_gone_harms_nobody() -> None:
    out = io.BytesIO()
    out.close()
    Speaker(out, 0).say("nobody hears this")


def test_facts_come_now_and_then_and_at_the_end_whatever_the_record_is_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speaker, "FACTS_S", 0.05)
    out, calls = io.BytesIO(), list[int]()

    def read() -> dict[str, int]:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("half-written")
        return {"step": len(calls)}

    teller = FactTeller(Speaker(out, 0), read)
    wait_for(lambda: len(calls) > 3, "some facts", 10)
    teller.end()
    steps = [line.facts["step"] for line in said(out)]
    assert steps == [number for number in range(1, len(calls) + 1) if number != 2]
