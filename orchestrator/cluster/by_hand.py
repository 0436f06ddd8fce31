"""A job started by torchrun or alone, without our launcher: the first rank freezes the bundle, the others load it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from orchestrator.bundle import Bundle, freeze, load_bundle, write_bundle
from orchestrator.cluster.local import next_attempt
from orchestrator.cluster.lock import only_writer
from orchestrator.compose import compose
from orchestrator.errors import OrchestratorError
from orchestrator.files import read_json
from orchestrator.train.initial import find_initial
from orchestrator.train.preflight import check_run
from orchestrator.train.process import error_file
from orchestrator.world import World, read_world

RankEntry = Callable[[str, int, float], None]


def run_by_hand(arguments: Sequence[str], entry: RankEntry, began: float) -> int:
    """Run one rank of a job given as RUN.json or as overrides; returns its exit code."""
    with ExitStack() as held:
        try:
            world = read_world()
            path, attempt = _agree(arguments, world, held)
        except OrchestratorError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        _run(entry, Path(path), attempt, world.rank, began)
    return 0


def _run(entry: RankEntry, path: Path, attempt: int, rank: int, began: float) -> None:
    """Run the rank, whose output goes to its log; an error is told here, where no launcher does."""
    with os.fdopen(os.dup(2), "w") as terminal:
        try:
            entry(str(path), attempt, began)
        except SystemExit:
            left = error_file(path.parent, attempt, rank)
            if left.exists():
                facts = read_json(left)
                print(f"{facts['traceback'] or ''}error: rank {rank}: {facts['error']}", file=terminal)
            raise


def _agree(arguments: Sequence[str], world: World, held: ExitStack) -> tuple[str, int]:
    """The bundle's path and the attempt's number, decided by the first rank."""
    if world.world_size == 1:
        return _decide(arguments, world, held)
    store, _, _ = next(rendezvous("env://"))
    store = PrefixStore(f"by_hand_{world.attempt}", store)
    if world.is_first:
        path, attempt = _decide(arguments, world, held)
        store.set("bundle", f"{attempt} {path}")
    attempt, _, path = store.get("bundle").decode().partition(" ")
    return path, int(attempt)


def _decide(arguments: Sequence[str], world: World, held: ExitStack) -> tuple[str, int]:
    bundle = _bundle(arguments)
    sets = check_run(bundle.config, world.local_world_size)
    held.enter_context(only_writer(bundle.folder))
    write_bundle(bundle, bundle.folder / "run.json", sets.facts())
    return str(bundle.folder / "run.json"), next_attempt(bundle.folder)


def _bundle(arguments: Sequence[str]) -> Bundle:
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        return load_bundle(Path(arguments[0]))
    composed = compose(arguments)
    return freeze(composed, find_initial(composed.config))
