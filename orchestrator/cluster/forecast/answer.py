"""What each layer of a cluster says to a run that is not there yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any, Protocol

Object = dict[str, Any]


class Verdict(IntEnum):
    """Ordered: the greatest one of all layers is the run's; what nobody could look at says nothing."""

    unchecked = 0
    fits = 1
    waits = 2
    never = 3

    @property
    def word(self) -> str:
        return "not checked" if self is Verdict.unchecked else self.name.upper()


@dataclass(frozen=True, slots=True)
class Finding:
    """One layer's answer with its arithmetic, and for NEVER the smallest change that makes it fit."""

    layer: str
    verdict: Verdict
    said: str
    way_out: str | None = None

    def facts(self) -> dict[str, Any]:
        return {"layer": self.layer, "verdict": self.verdict.name, "said": self.said, "way_out": self.way_out}


class Surroundings(Protocol):
    """What a cluster told of itself at one moment."""

    @property
    def namespace(self) -> str: ...

    @property
    def taken_at(self) -> datetime: ...

    def of(self, kind: str) -> Sequence[Object]:
        """All objects of a kind that could be read: the namespace's, or the cluster's where it has no namespace."""
        ...

    def unread(self, kind: str) -> str | None:
        """Why a kind could not be read; None where it was."""
        ...


def worst(findings: Iterable[Finding]) -> Verdict:
    """A run waits or never starts where one layer says so."""
    return max((finding.verdict for finding in findings), default=Verdict.unchecked)


def unchecked(layer: str, around: Surroundings, *kinds: str) -> Finding | None:
    """The answer of a layer that needs kinds which could not be read."""
    missing = [f"{kind}: {reason}" for kind in kinds if (reason := around.unread(kind))]
    return Finding(layer, Verdict.unchecked, "not checked: " + "; ".join(missing)) if missing else None


def named(objects: Iterable[Object], name: str) -> Object | None:
    return next((one for one in objects if one["metadata"]["name"] == name), None)
