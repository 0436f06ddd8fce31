"""The mirror of a run's checkpoints in an object store, kept by a thread of the first rank.

Keys: ``step_N.gG/FILE`` with the generation G of the writer, the manifest last, and ``latest.json``, which says who
may write. A start raises its generation by a conditional put, so an older writer that is still alive finds that the
pointer is no longer the version it knows.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.config import CheckpointingConfig
from orchestrator.errors import CheckpointError, TransientError
from orchestrator.redact import redact
from orchestrator.train.bucket import ABSENT, Bucket, Conflict, StoreError
from orchestrator.train.checkpoint import LATEST, MANIFEST, SCHEMA, open_checkpoint, read_checkpoint, step_folder
from orchestrator.train.fence import Fence
from orchestrator.train.retention import kept
from orchestrator.train.writing import point_to

log = logging.getLogger(__name__)
FOLDER = re.compile(r"(step_\d{8})\.g(\d{4})")
START_TRIES = 5
LONGEST_PAUSE_S = 30.0


class TakenOver(CheckpointError):
    """A newer writer has the mirror."""


@dataclass(slots=True)
class Shelf:
    """What the store holds, as far as this process knows."""

    bucket: Bucket
    generation: int = 0
    version: str | None = None
    """Of the pointer, as this writer last wrote it."""
    pointer: dict[str, Any] = field(default_factory=dict)
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By folder in the store."""

    def claim(self) -> None:
        """Become the only writer. Raises StoreError."""
        while True:
            found = self.bucket.get(LATEST)
            earlier = _parse(found[0]) if found else {}
            generation = int(earlier.get("generation", 0)) + 1
            pointer = {**earlier, "schema": SCHEMA, "generation": generation}
            try:
                self.version = self.bucket.put(LATEST, _json(pointer), (found[1] or None) if found else ABSENT)
            except Conflict:  # somebody else claims it at the same time
                continue
            self.generation, self.pointer = generation, pointer
            self._look()
            return

    def _look(self) -> None:
        """Read what is there and remove what earlier writers left half done."""
        names = self.bucket.names()
        for folder in {name.split("/")[0] for name in names if FOLDER.match(name)}:
            found = self.bucket.get(f"{folder}/{MANIFEST}") if f"{folder}/{MANIFEST}" in names else None
            if found is not None:
                self.manifests[folder] = _parse(found[0])
                continue
            for name in names:
                if name.startswith(f"{folder}/"):
                    self.bucket.remove(name)

    def upload(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Files first, then the manifest, then the pointer. Raises TakenOver where a newer writer has come.

        That one may have removed the files as those of a dead writer, so nothing becomes a checkpoint before a look.
        """
        name = f"{folder.name}.g{self.generation:04d}"
        for file in manifest["files"]:
            self.bucket.put_file(f"{name}/{file}", folder / file)
        self.point({})
        self.bucket.put_file(f"{name}/{MANIFEST}", folder / MANIFEST)
        pointed = self.pointer.get("step", -1)
        self.point({**self.pointer, "step": manifest["step"], "folder": name} if manifest["step"] > pointed else {})
        self.manifests[name] = manifest

    def point(self, pointer: dict[str, Any]) -> None:
        """Write the pointer over the version that this writer knows; {} = as it is, to see that it still may write."""
        pointer = pointer or self.pointer
        try:
            self.version = self.bucket.put(LATEST, _json(pointer), self.version)
        except Conflict:
            found = self.bucket.get(LATEST)
            now = _parse(found[0]) if found else {}
            if now != pointer:  # else an answer was lost on its way
                raise TakenOver(
                    f"another process has taken over {redact(self.bucket.url)} (generation {now.get('generation')}, "
                    f"this is {self.generation}), so this attempt ends. Way out: nothing; the newer one goes on"
                ) from None
            self.version = found[1] if found else None
        self.pointer = pointer

    def prune(self, settings: CheckpointingConfig) -> None:
        stays = kept(set(self.manifests), self.manifests, settings)
        for folder in sorted(set(self.manifests) - stays):
            self.bucket.remove(f"{folder}/{MANIFEST}")  # first: without it the rest is no checkpoint
            for file in self.manifests.pop(folder).get("files", {}):
                self.bucket.remove(f"{folder}/{file}")

    def fetch(self, folder: str, into: Path) -> None:
        """Raises StoreError, CheckpointError where what came is not what the manifest says."""
        self.bucket.get_file(f"{folder}/{MANIFEST}", into / MANIFEST)
        for file in read_checkpoint(into).manifest["files"]:
            self.bucket.get_file(f"{folder}/{file}", into / file)
        open_checkpoint(into)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _parse(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class StoreMirror:
    """Brings every checkpoint that stays here to the store as well, newest first, as long as it takes."""

    def __init__(self, url: str, settings: CheckpointingConfig, fence: Fence):
        """`url`: of the checkpoints of this run alone."""
        self._settings, self._fence = settings, fence
        self._shelf = Shelf(Bucket(url))
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._offers, self._served, self._closed, self._failing = 0, 0, False, ""
        self.held: frozenset[str] = frozenset()
        self.error: TakenOver | None = None
        """A newer writer has come: this attempt must end."""

    def bring(self, step: int) -> None:
        """Claim the store and get the newest whole checkpoint after `step` from it; -1: there is none here.

        Raises TransientError where the store does not answer and nothing is here to go on from.
        """
        try:
            self._claim()
        except StoreError as error:
            if step < 0 or not error.passing:
                raise self._unreachable(error) from None
            log.warning("%s; the run goes on without its mirror until it answers", error)
            return
        for folder in sorted(self._shelf.manifests, reverse=True):
            match = FOLDER.fullmatch(folder)
            if match and match[1] > step_folder(max(step, 0)) and self._fetch(folder, match[1]):
                return

    def _claim(self) -> None:
        for left in reversed(range(START_TRIES)):
            try:
                self._shelf.claim()
                return
            except StoreError as error:
                if not left or not error.passing:
                    raise
                time.sleep(2.0 ** (START_TRIES - 1 - left) / 4)

    def _unreachable(self, error: StoreError) -> TransientError | CheckpointError:
        text = f"checkpointing.mirror = {redact(self._settings.mirror or '')}: {redact(str(error))}. Way out: "
        if error.passing:
            return TransientError(f"{text}the same command goes on once the store answers")
        return CheckpointError(f"{text}mend the address, the credentials or the rights; or leave the mirror out")

    def _fetch(self, folder: str, name: str) -> bool:
        made = self._fence.make(name)
        try:
            self._shelf.fetch(folder, made)
            self._fence.put(made, self._fence.root / name)
            point_to(self._fence, int(name.removeprefix("step_")))
        except CheckpointError as error:
            log.warning("passing over a damaged checkpoint of the mirror, %s: %s", folder, error)
            return False
        except StoreError as error:
            raise self._unreachable(error) from None
        finally:
            shutil.rmtree(made, ignore_errors=True)
        log.warning("got %s from the mirror %s", name, redact(self._shelf.bucket.url))
        return True

    def offer(self) -> None:
        """Something was sealed; also called once at the start, for what an earlier attempt could not bring."""
        with self._wake:
            self._offers += 1
            self._wake.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True, name="checkpoint mirror")
            self._thread.start()

    def finish(self, limit_s: float) -> None:
        """Wait until all is there. Raises TransientError after `limit_s`, TakenOver where a newer writer came."""
        with self._wake:
            self._wake.wait_for(lambda: self._served >= self._offers or self.error is not None, limit_s)
        if self.error is not None:
            raise self.error
        if self._served < self._offers:
            why = self._failing or f"not done within {limit_s:g} s"
            raise TransientError(
                f"checkpointing.mirror = {redact(self._settings.mirror or '')}: the last checkpoint is on this machine "
                f"only ({why}). Way out: the same command brings it there once the store answers"
            )

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(1.0)
        self._shelf.bucket.close()

    def _serve(self) -> None:
        pause_s = 0.5
        while not self._closed:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._served < self._offers)
                offers = self._offers
            try:
                self._bring_all()
            except StoreError as error:
                if not self._closed and not self._failing:
                    log.warning("%s; training goes on and the mirror is tried again", redact(str(error)))
                self._failing = redact(str(error))
                with self._wake:
                    self._wake.wait_for(lambda: self._closed, pause_s)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
                continue
            except TakenOver as error:
                self._stop(error)
                return
            if self._failing:
                log.warning("the mirror %s answers again", redact(self._shelf.bucket.url))
            self._failing, pause_s = "", 0.5
            with self._wake:
                self._served = offers
                self._wake.notify_all()

    def _stop(self, error: TakenOver) -> None:
        with self._wake:
            self.error = error
            self._wake.notify_all()

    def _bring_all(self) -> None:
        """Upload what is here and not there, newest first, then let the store forget what need not stay."""
        if self._shelf.generation == 0:
            self._shelf.claim()
        for folder in sorted(self._fence.root.glob("step_*"), reverse=True):
            self.held = frozenset({folder.name})
            try:
                manifest = read_checkpoint(folder).manifest
            except CheckpointError:  # damaged, or removed a moment ago
                continue
            try:
                if not self._has(manifest):
                    self._shelf.upload(folder, manifest)
            except StoreError:
                if folder.is_dir():
                    raise
            finally:
                self.held = frozenset()
        self._shelf.prune(self._settings)

    def _has(self, manifest: dict[str, Any]) -> bool:
        known = (there.get("manifest_sha256") for there in self._shelf.manifests.values())
        return manifest["manifest_sha256"] in known
