"""``python -m tests.bench.loaders.remote SET``: an epoch from S3 on the loopback, cache empty and cache full.

Every epoch is a process of its own (`remote_epoch`), two workers each, in turns. What the store sent is counted: all of
the set for an empty cache, none of it for a full one, or the figure is refused.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.loaders import peers, sets
from tests.bench.loaders.catalogue import LOADERS
from tests.bench.loaders.process import run_and_end
from tests.bench.loaders.seaweed import BUCKET, Store, store

TIMES = min(3, int(os.environ.get("LOADERS_ROUNDS", "3")))
LONGEST_S = 150
"""For one epoch; some 10 s where nothing else runs."""
FOLDERS = {"ours": "crop_ready", "litdata": "litdata_16mb", "mosaic_io": "mds_bytes"}
"""Loader -> what it reads, in a set and in the bucket."""
WHOLE, NOTHING = 0.95, 0.01
"""Of a set's bytes: at least so much is sent to an empty cache, at most so much (the index) to a full one."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A loader on an uploaded set."""

    name: str
    store: Store
    size: int
    """Bytes of the set."""
    folder: Path
    """For its caches."""

    def round(self, number: int) -> dict[str, float]:
        """An epoch that fills a cache, and one that reads it. Raises RuntimeError, TimeoutExpired."""
        cache = self.folder / f"{self.name}-{number}"
        cold, sent = self._epoch(cache)
        _require(sent >= WHOLE * self.size, f"{sent:,} of {self.size:,} bytes were sent to an empty cache")
        warm, sent = self._epoch(cache)
        _require(sent <= NOTHING * self.size, f"{sent:,} of {self.size:,} bytes were sent to a full cache")
        return {f"cold_{key}": value for key, value in cold.items()} | {f"warm_{key}": warm[key] for key in warm}

    def _epoch(self, cache: Path) -> tuple[dict[str, float], int]:
        """Figures of an epoch, and the bytes that were sent for it."""
        before = self.store.sent_bytes()
        done = _run(self.name, "remote_epoch", self.name, f"s3://{BUCKET}", str(cache))
        return json.loads(done.splitlines()[-1]), self.store.sent_bytes() - before


def _run(name: str, module: str, *arguments: str) -> str:
    """Run a module of this folder in the environment of a loader; returns its stdout."""
    python = sys.executable if LOADERS[name].is_ours else str(peers.PYTHON)
    command = [python, "-m", f"tests.bench.loaders.{module}", *arguments]
    done = run_and_end(command, sets.ROOT, LONGEST_S)
    lines = [line.strip() for line in done.stderr.splitlines() if "rror" in line] or [done.stderr[-200:]]
    _require(not done.returncode, lines[-1][:300])
    return done.stdout


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


def _prepare(name: str, data: Path, to: Store, folder: Path) -> Measured:
    """Make what a loader reads where it is missing, and upload it."""
    source, done = data / FOLDERS[name], data / f".{FOLDERS[name]}"
    if FOLDERS[name] not in sets.SHARDS and not done.exists():
        _run(name, "run", name, "--data", str(data), "--convert", "--folder", FOLDERS[name])
        done.touch()
    return Measured(name, to, to.upload(source, FOLDERS[name]), folder)


def measure(loaders: dict[str, Measured]) -> dict[str, Any]:
    """Loader -> medians over the rounds, or why it has none: one failure leaves it out of what follows."""
    absent: dict[str, Any] = {}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
    for number in range(TIMES):
        for name in [name for name in loaders if name not in absent]:
            try:
                rounds[name].append(loaders[name].round(number))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                absent[name] = {"absent": str(error)[-300:]}
    return {name: absent.get(name) or _medians(name, rounds[name]) for name in loaders}


def _medians(name: str, rounds: list[dict[str, float]]) -> dict[str, Any]:
    medians = {key: round(statistics.median(one[key] for one in rounds), 2) for key in rounds[0]}
    return {"title": LOADERS[name].title, **medians, "rounds": len(rounds)}


def main(data: Path) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, store(Path(folder) / "store") as to:
        print(json.dumps(measure({name: _prepare(name, data, to, Path(folder)) for name in FOLDERS})))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
