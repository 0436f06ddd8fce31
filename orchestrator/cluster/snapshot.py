"""What a cluster said of itself and of one run at one moment: plain JSON, versioned, without secrets. Pure.

`orchestrator snapshot` writes it, so that somebody else can look at what a user saw; `why` reads nothing else. A `List`
that `kubectl get ... -o json` printed is one too, as far as it goes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError

SCHEMA = 1
KIND = "orchestrator/snapshot"
Object = dict[str, Any]
TIMES = ("lastTimestamp", "eventTime", "lastHeartbeatTime", "lastTransitionTime", "creationTimestamp", "startTime")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Objects by kind, as the cluster spells it; a kind is in `objects` or in `missing`, or nobody asked for it."""

    taken: str
    """When, in RFC 3339."""
    cluster: str
    """local, ray or kubernetes."""
    place: str
    """Which one: the server and the context, the address or the folder of runs."""
    namespace: str = ""
    run_id: str | None = None
    """The run that was asked for."""
    objects: Mapping[str, Sequence[Object]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    """By kind, why it was not read: `no right to list nodes`."""
    limits: Mapping[str, str] = field(default_factory=dict)
    """By kind, why only a part of it was read."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What the run itself told: see `cluster.testimony`."""

    @property
    def taken_at(self) -> datetime:
        return datetime.fromisoformat(self.taken)

    def of(self, kind: str) -> Sequence[Object]:
        """All objects of a kind that could be read: the namespace's, or the cluster's where it has no namespace."""
        return self.objects.get(kind, ())

    def unread(self, kind: str) -> str | None:
        """Why a kind could not be read; None where it was, be it that there is none."""
        if kind in self.objects:
            return None
        return self.missing.get(kind, f"nobody asked for {kind}")

    def facts(self) -> dict[str, Any]:
        """As it is written."""
        names = ("taken", "cluster", "place", "namespace", "run_id", "objects", "missing", "limits", "record")
        return {"schema": SCHEMA, "kind": KIND, **{name: getattr(self, name) for name in names}}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def read_snapshot(paths: Sequence[Path]) -> Snapshot:
    """One file of `orchestrator snapshot`, or any number that kubectl printed. Raises UserError for anything else."""
    documents = [document for path in paths for document in _documents(path)]
    if len(documents) == 1 and documents[0].get("kind") == KIND:
        return _from_facts(documents[0], paths[0])
    if any(document.get("kind") == KIND for document in documents):
        raise UserError("--snapshot: one snapshot is one moment. Way out: give a single file that `snapshot` wrote")
    return from_kubectl(documents)


def _documents(path: Path) -> Iterator[Object]:
    """The JSON objects of a file, which may hold several one after the other, as a script that calls kubectl leaves."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise UserError(f"--snapshot {path}: cannot be read ({reason}). Way out: check the path") from None
    decoder, at = json.JSONDecoder(), 0
    while text[at:].strip():
        try:
            document, at = decoder.raw_decode(text, len(text) - len(text[at:].lstrip()))
        except ValueError as error:
            raise UserError(f"--snapshot {path}: {error}. Way out: `kubectl get ... -o json`, no YAML") from None
        if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
            rule = "is no object of a cluster: it has no `kind`"
            raise UserError(f"--snapshot {path}: {rule}. Way out: `orchestrator snapshot ID -o FILE` writes one")
        yield document


def _from_facts(facts: Object, path: Path) -> Snapshot:
    if facts.get("schema") != SCHEMA:
        rule = f"schema = {facts.get('schema')}, and this version reads {SCHEMA}"
        raise UserError(f"--snapshot {path}: {rule}. Way out: the version of orchestrator that wrote it")
    try:
        known = {key: value for key, value in facts.items() if key not in ("schema", "kind")}
        found = Snapshot(**known)
        _ = found.taken_at
    except (TypeError, ValueError) as error:
        raise UserError(f"--snapshot {path}: not what `snapshot` writes ({error}). Way out: take it again") from None
    return found


def from_kubectl(documents: Iterable[Object]) -> Snapshot:
    """Objects as kubectl prints them: single ones, a `List` of anything, a `PodList` whose items bear no kind."""
    objects: dict[str, list[Object]] = {}
    for one in documents:
        for obj in _items(one):
            objects.setdefault(str(obj["kind"]), []).append(obj)
    spaces = [obj["metadata"].get("namespace") for found in objects.values() for obj in found]
    namespace = next(filter(None, spaces), "default")
    taken = max(filter(None, map(_newest, (obj for found in objects.values() for obj in found))), default=now())
    return Snapshot(taken, "kubernetes", "kubectl", namespace, None, objects)


def _items(document: Object) -> Iterator[Object]:
    kind = str(document["kind"])
    if not kind.endswith("List"):
        yield _event(document)
        return
    own = {} if kind == "List" else {"kind": kind.removesuffix("List"), "apiVersion": document.get("apiVersion", "")}
    for item in document.get("items") or []:
        yield _event({**own, **item})


def _event(obj: Object) -> Object:
    """Of the newer group of events in the words of the older one, which is what kubectl asks for by itself."""
    if "regarding" not in obj:
        return obj
    last = (obj.get("series") or {}).get("lastObservedTime") or obj.get("deprecatedLastTimestamp")
    return {**obj, "involvedObject": obj["regarding"], "message": obj.get("note"), "lastTimestamp": last}


def _newest(obj: Object) -> str | None:
    """The newest moment that an object names: a list of kubectl does not say when it was printed."""
    status = obj.get("status") or {}
    places = [obj, obj.get("metadata") or {}, status, *(status.get("conditions") or [])]
    return max((str(place[name]) for place in places for name in TIMES if place.get(name)), default=None)
