"""The lines of a pod's stdout: whatever a rank prints comes back as it was, by attempt, rank and number."""

from __future__ import annotations

import random
import time

import pytest

from orchestrator.cluster.lines import (
    PART,
    Numbered,
    Said,
    parse,
    progress_line,
    read_lines,
    stack_end,
    stack_lines,
)

NASTY = [
    b"plain",
    b"",
    b" leading and trailing ",
    b"[a2 r1 #7] a forged prefix",
    b'[a2 n0 progress] {"step": 9}',
    "żółć \U0001f600 \u2028 \x85 \x0b end".encode(),
    b"progress 10%\rprogress 20%\r",
    b"no \xff utf-8 \xc3",
    b"null \x00 and escape \x1b[31mred",
    b"x" * (3 * PART),
    b"y" * (PART + 1),
    "ł".encode() * (2 * PART),
    b'{"json": true}',
]


def said(written: str) -> list[Said]:
    """A reader's view: it splits at newlines alone."""
    *lines, rest = written.split("\n")
    assert rest == ""
    return list(read_lines(lines))


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_any_bytes_come_back_by_rank_and_number_however_they_were_read(size: int) -> None:
    log = b"\n".join(NASTY) + b"\n"
    numbered = Numbered(2, "r0")
    written = "".join(numbered.feed(log[at : at + size]) for at in range(0, len(log), size)) + numbered.feed(b"", True)
    expected = [line.decode(errors="replace") for line in NASTY]
    assert [(line.attempt, line.rank, line.number) for line in said(written)] == [
        (2, 0, number) for number in range(1, len(NASTY) + 1)
    ]
    assert [line.text for line in said(written)] == expected
    assert all(line.kind == "log" and line.ask is None for line in said(written))


def test_no_written_line_is_longer_than_a_container_runtime_takes() -> None:
    numbered = Numbered(10**6, "r99999")
    written = numbered.feed("\U0001f600".encode() * 50_000 + b"\n")
    assert max(len(line.encode()) for line in written.split("\n")) < 16 * 1024


@pytest.mark.parametrize("last", [b"torn", b"z" * PART, b"z" * (PART + 1), b"\xe2\x82"])
def test_a_last_line_without_an_end_is_a_line(last: bytes) -> None:
    numbered = Numbered(1, "r3")
    written = numbered.feed(b"whole\n" + last) + numbered.feed(b"", last=True)
    assert [line.text for line in said(written)] == ["whole", last.decode(errors="replace")]
    assert numbered.feed(b"", last=True) == ""


def test_parts_of_two_ranks_lines_may_alternate() -> None:
    lines = ["[a1 r0 #1+] ab", "[a1 r1 #1+] xy", "[a1 r1 #1] z", "[a1 r0 #1] c"]
    assert [(line.rank, line.text) for line in read_lines(lines)] == [(1, "xyz"), (0, "abc")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[a2 r0 #41] text", Said(2, 0, None, "log", 41, "text")),
        ("[a2 r0 #41+] first", Said(2, 0, None, "log", 41, "first", more=True)),
        ("[a2 r0 #41]", Said(2, 0, None, "log", 41, "")),  # a tool took the space at the end
        ("[a0 n1 #3] waits", Said(0, None, 1, "log", 3, "waits")),
        ("[a2 r0 stack-7 #1] f.py:1 in f", Said(2, 0, None, "stack", 1, "f.py:1 in f", ask="stack-7")),
        ("[a2 n1 stack-7 end] 2 3", Said(2, None, 1, "stack end", 0, "2 3", ask="stack-7")),
        ("Traceback (most recent call last):", None),
        ("[a2 r0] text", None),
        ("[a2 r0 #x] text", None),
        (" [a2 r0 #1] text", None),
        ("", None),
    ],
)
def test_each_form_is_read_as_it_is_documented(line: str, expected: Said | None) -> None:
    assert parse(line) == expected


def test_facts_and_stacks_come_back() -> None:
    (fact,) = said(progress_line(2, 0, {"step": 41, "eta_s": None, "run_id": "ż\n"}))
    assert (fact.kind, fact.attempt, fact.node, fact.facts) == (
        "progress", 2, 0, {"step": 41, "eta_s": None, "run_id": "ż\n"},
    )  # fmt: skip
    answer = said(stack_lines("stack-7", 2, 5, ["a.py:1 in f", "b.py:2 in g"]) + stack_end("stack-7", 2, 1, [5, 6]))
    assert [(line.kind, line.rank, line.text) for line in answer] == [
        ("stack", 5, "a.py:1 in f"), ("stack", 5, "b.py:2 in g"), ("stack end", None, "5 6"),
    ]  # fmt: skip
    assert answer[-1].ranks == [5, 6]


def test_random_bytes_lose_nothing() -> None:
    draw = random.Random(5)
    for _ in range(100):
        log = bytes(draw.choice(b"\n\r\xc3\xa4ab[]# \xff\x00") for _ in range(draw.randrange(300)))
        numbered = Numbered(1, "r0")
        cut = draw.randrange(len(log) + 1)
        written = numbered.feed(log[:cut]) + numbered.feed(log[cut:]) + numbered.feed(b"", last=True)
        expected = log.decode(errors="replace").split("\n")
        assert [line.text for line in said(written)] == (expected if expected[-1] else expected[:-1])


def test_a_hundred_thousand_lines_are_numbered_in_a_moment() -> None:
    log, numbered = b"step 12345  loss 0.1234  top-1 56.7%  1,234 images/s\n" * 100_000, Numbered(1, "r0")
    began = time.process_time()
    written = numbered.feed(log)
    assert time.process_time() - began < 2  # of what 10,000 lines a second leave, a fifth
    assert written.count("\n") == 100_000
