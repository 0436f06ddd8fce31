"""Attempt fencing: an older attempt that is still alive cannot change the checkpoints of a newer one.

Every change of `checkpoints/` is one rename out of or into a folder that belongs to one attempt, ``.attempt_A.TOKEN``.
A newer attempt takes that folder away before it looks for a checkpoint, and from then on each rename of the older one
fails, wherever it was stopped. No lock is held, so a writer that was stopped for good blocks nobody.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import CheckpointError
from orchestrator.files import disk_errors, sync_folder


class Fence:
    """The right of one attempt to change a folder of checkpoints, until a newer one claims it."""

    def __init__(self, root: Path, attempt: int):
        """Claim the folder. Raises CheckpointError where a newer attempt holds it."""
        self.root, self.attempt = root, attempt
        self.folder = root / f".attempt_{attempt}.{secrets.token_hex(4)}"
        with disk_errors(root):
            self.folder.mkdir(parents=True)
            for other in sorted(set(root.glob(".attempt_*.*")) - {self.folder}):
                self._take(other)
            sync_folder(root)

    def _take(self, other: Path) -> None:
        number = other.name.split(".")[1].removeprefix("attempt_")
        if number.isdecimal() and int(number) > self.attempt:
            self.release()
            raise CheckpointError(
                f"{self.root} belongs to attempt {number} of this run, and this is attempt {self.attempt}. Way out: "
                f"nothing, if that one runs; else remove {other}"
            )
        taken = self.folder / other.name
        try:
            os.rename(other, taken)
        except FileNotFoundError:  # a third attempt was faster
            return
        shutil.rmtree(taken, ignore_errors=True)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Name the reason where a path is gone because a newer attempt took this one's folder."""
        try:
            yield
        except FileNotFoundError as error:
            if self.folder.is_dir():
                raise
            raise CheckpointError(
                f"a newer attempt saves to {self.root} now, so attempt {self.attempt} ends. Nothing of it was saved "
                "since then. Way out: nothing; the newer one goes on"
            ) from error

    def make(self, name: str) -> Path:
        """An empty folder to work in."""
        made = self.folder / name
        shutil.rmtree(made, ignore_errors=True)
        with self.holding():
            made.mkdir()
        return made

    def put(self, made: Path, final: Path) -> None:
        """Give what was made here its place, durably; what stood there is removed."""
        with self.holding():
            if final.is_dir():
                self.remove(final)
            os.rename(made, final)
            sync_folder(final.parent)

    def remove(self, folder: Path) -> None:
        """Remove a folder so that it is never half there."""
        with self.holding():
            doomed = self.folder / f"removed_{folder.name}"
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def release(self) -> None:
        """Leave nothing behind at the end."""
        shutil.rmtree(self.folder, ignore_errors=True)
