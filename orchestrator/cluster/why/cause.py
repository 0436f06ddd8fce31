"""A cause, what proves it, and the one rule by which causes are put in order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

LONGEST = 600
"""Characters of a value that is shown as evidence."""
SHOWN = 4
"""Pieces of evidence of one cause."""


class Stage(IntEnum):
    """How far a run has come, in the order of its life."""

    queue = 0
    creation = 1
    placing = 2
    volumes = 3
    image = 4
    start = 5
    meeting = 6
    training = 7
    end = 8


class Depth(IntEnum):
    """How near to the root."""

    root = 0
    """Something that has happened, or a value that stands there."""
    own = 1
    """What the run says of itself: an exit code, an error whose root nobody saw."""
    follows = 2
    """What follows from something else: a peer that waited, a limit that was reached at last."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where anybody can read it."""

    object: str
    """Kind and name, e.g. `Pod digits-0`, or the file of a run's folder."""
    field: str
    value: str


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing that is wrong."""

    name: str
    """Of the kind of cause, as it stands in docs/why.md."""
    said: str
    """One sentence."""
    way_out: str
    stage: Stage
    evidence: tuple[Evidence, ...] = ()
    depth: Depth = Depth.root
    passes: bool = False
    """Whether it may pass by itself, as a full queue does."""
    past: bool = False
    """Whether it was met by an earlier attempt and holds nothing now."""
    weight: float = 0.0
    """Among equals the greater one counts more: how many nodes it keeps away."""
    at: str = ""
    """When it was first seen, in RFC 3339; of equals the earliest is the first cause."""
    whom: tuple[str, ...] = field(default=())
    """The pods that it was seen at."""

    def facts(self) -> dict[str, Any]:
        told = [{"object": one.object, "field": one.field, "value": one.value} for one in self.evidence]
        names = ("name", "said", "way_out", "passes", "past")
        facts = {name: getattr(self, name) for name in names}
        return {**facts, "stage": self.stage.name, "depth": self.depth.name, "pods": len(self.whom), "evidence": told}


def rank_of(cause: Cause) -> tuple[bool, Depth, bool, Stage, float, str]:
    """The rule. The first cause is the one that should be mended first:

    1. what holds or ended the run now comes before what an earlier attempt met;
    2. a root comes before what the run says of itself, and that before what follows from something else;
    3. what only a person mends comes before what may pass by itself, since waiting mends the second alone;
    4. what comes earlier in a run's life holds up all that is later;
    5. then what keeps more nodes away, and at last what was seen first.
    """
    return cause.past, cause.depth, cause.passes, cause.stage, -cause.weight, cause.at or "9"


def ranked(causes: Iterable[Cause]) -> list[Cause]:
    """In that order, each once: the same cause at many pods is one, with all of them."""
    found: dict[tuple[str, str, bool], Cause] = {}
    for cause in causes:
        key = (cause.name, cause.said, cause.past)
        found[key] = joined(found[key], cause) if key in found else cause
    return sorted(found.values(), key=rank_of)


def joined(one: Cause, other: Cause) -> Cause:
    evidence = one.evidence + tuple(piece for piece in other.evidence if piece not in one.evidence)
    at = min(filter(None, (one.at, other.at)), default="")
    whom = tuple(dict.fromkeys(one.whom + other.whom))
    return replace(one, evidence=evidence[:SHOWN], whom=whom, at=at, weight=max(one.weight, other.weight))


def shown(value: object) -> str:
    """As evidence: whole where it is short, on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
