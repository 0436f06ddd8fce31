"""What a pod's stdout carries, as lines that a person can read and a program can join. Pure.

    [a2 r0 #41] text           line 41 of the log of rank 0 in attempt 2 (`logs/attempt_2/rank_0.log`, counted from 1)
    [a2 r0 #41+] text          the same, and the rest of that line follows in this rank's next one
    [a2 n1 #3] text            the third line of the launcher of node 1, which is in no file; a0: before its attempt
    [a2 n0 progress] {...}     where the run stands: JSON with schema, run_id, t, state, attempt, world_size, step,
                               total_steps, epoch, eta_s, images_per_s, goodput; null where a figure is not known yet
    [a2 r0 stack-7 #1] text    the answer to the request `stack-7`: where rank 0 is, innermost call first
    [a2 n1 stack-7 end] 2 3    node 1 has answered that request, for ranks 2 and 3

Lines end in "\\n" and in nothing else: a text may hold any other character, a carriage return too. Bytes that are no
UTF-8 have become U+FFFD. A long line comes in parts, since container runtimes cut lines at 16 KiB. What a rank prints
stands after a prefix, so that it cannot pass for another's; what has no prefix comes from no rank.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

PART = 4000
"""Characters of a line, at most 4 bytes each."""
LAST_WORDS = '{"schema"'
Kind = Literal["log", "progress", "stack", "stack end"]
SAID = re.compile(
    r"\[a(?P<attempt>\d+) (?P<who>[rn])(?P<place>\d+) "
    r"(?:(?P<progress>progress)|#(?P<line>\d+)(?P<more>\+?)|(?P<ask>stack-\d+) (?:#(?P<frame>\d+)|end))\]"
    r"(?: (?P<text>.*))?",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Said:
    """A line of a pod's stdout."""

    attempt: int
    rank: int | None
    """None: a launcher said it."""
    node: int | None
    """Of that launcher."""
    kind: Kind
    number: int
    """Of the line in its log, or in the stack; 0 where there is one line alone."""
    text: str
    more: bool = False
    """Whether the line goes on in the next one of the same rank."""
    ask: str | None = None
    """The request that it answers."""

    @property
    def facts(self) -> dict[str, Any]:
        """Those of a line of progress."""
        return json.loads(self.text)

    @property
    def ranks(self) -> list[int]:
        """Those that the end of an answer stands for."""
        return [int(rank) for rank in self.text.split()]


def parse(line: str) -> Said | None:
    """Read one line, without its end; None where it has no prefix of ours."""
    found = SAID.fullmatch(line)
    if found is None:
        return None
    place, by_rank = int(found["place"]), found["who"] == "r"
    answers = "stack" if found["frame"] else "stack end"
    return Said(
        attempt=int(found["attempt"]),
        rank=place if by_rank else None,
        node=None if by_rank else place,
        kind="progress" if found["progress"] else answers if found["ask"] else "log",
        number=int(found["line"] or found["frame"] or 0),
        text=found["text"] or "",
        more=bool(found["more"]),
        ask=found["ask"],
    )


def read_lines(lines: Iterable[str]) -> Iterator[Said]:
    """The same of many, with long lines put together; what has no prefix is left out."""
    begun: dict[tuple[int, int | None, int | None], list[str]] = {}
    for said in filter(None, map(parse, lines)):
        if said.kind != "log":
            yield said
            continue
        parts = begun.setdefault((said.attempt, said.rank, said.node), [])
        parts.append(said.text)
        if not said.more:
            yield replace(said, text="".join(parts))
            parts.clear()


def source(rank: int | None, node: int) -> str:
    return f"n{node}" if rank is None else f"r{rank}"


class Numbered:
    """Turns what is read from a log, bit by bit, into numbered lines."""

    def __init__(self, attempt: int, who: str, clean: Callable[[str], str] = str):
        """`who`: as `source` names it; `clean`: what a line's text is before it is cut into parts."""
        self._head, self._number, self._clean = f"[a{attempt} {who} #", 1, clean
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest, self._has_begun = "", False

    def feed(self, content: bytes, last: bool = False) -> str:
        """The lines that this completes. `last`: nothing follows, so that a line without an end is one, too."""
        *lines, rest = (self._rest + self._decoder.decode(content, last)).split("\n")
        said = [self._line(self._clean(line)) for line in lines]
        parts, self._rest = self._parts(rest)
        said.append(parts)
        if last and (self._rest or self._has_begun):
            said.append(self._line(self._clean(self._rest)))
            self._rest = ""
        return "".join(said)

    def _line(self, text: str) -> str:
        parts, rest = self._parts(text)
        number, self._number, self._has_begun = self._number, self._number + 1, False
        return f"{parts}{self._head}{number}] {rest}\n"

    def _parts(self, text: str) -> tuple[str, str]:
        """All parts of a long line but the last, and that one."""
        parts = []
        while len(text) > PART:
            parts.append(f"{self._head}{self._number}+] {self._clean(text[:PART])}\n")
            text, self._has_begun = text[PART:], True
        return "".join(parts), text


def progress_line(attempt: int, node: int, facts: Mapping[str, Any]) -> str:
    return f"[a{attempt} n{node} progress] {json.dumps(facts)}\n"


def stack_lines(ask: str, attempt: int, rank: int, frames: Sequence[str]) -> str:
    """A rank's stack as the answer to a request."""
    return "".join(f"[a{attempt} r{rank} {ask} #{number}] {frame}\n" for number, frame in enumerate(frames, 1))


def stack_end(ask: str, attempt: int, node: int, ranks: Iterable[int]) -> str:
    """What a node says last of its answer."""
    return f"[a{attempt} n{node} {ask} end] {' '.join(map(str, ranks))}\n"


def last_words(text: str) -> dict[str, Any]:
    """What the driver on Ray printed last, from a log or the message that Ray makes of its end; empty where it did not.

    Such a line stands without a prefix: exit_code, error, rank, attempt and step as JSON.
    """
    for line in reversed(text.splitlines()):
        if line.startswith(LAST_WORDS):
            try:
                return json.loads(line)
            except ValueError:
                return {}
    return {}
