"""``python -m tests.bench.loaders.resume SET``: seconds to the first batch of a fresh epoch and of a resumed one.

Each loader is stopped after half an epoch and built again from its own state in the same process, imports left out.
Ours needs no state but the step.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.loaders import lit, mosaic, ours
from tests.bench.loaders.catalogue import LOADERS

HALF = 16
WORKERS = 2
TIMES = 3


def _ours(data: Path) -> Callable[[int], Any]:
    shards = str(data / "crop_ready" / "train")
    config = ours.config_of(shards, WORKERS, "fast")
    return lambda step: ours.loader_of(shards, config, range(step, 10_000))


def _theirs(make: Callable[[], Any]) -> Callable[[int], Any]:
    """Stop a loader after `step` batches; a second one takes its state."""

    def build(step: int) -> Any:
        if not step:
            return make()
        first = make()
        items = iter(first)
        for _ in range(step):
            next(items)
        state = first.state_dict()
        del items, first
        second = make()
        second.load_state_dict(state)
        return second

    return build


def seconds(build: Callable[[int], Any], step: int) -> float:
    """From a loader that knows where it goes on to its first batch."""
    loader = build(step)
    began = time.perf_counter()
    next(iter(loader))
    return time.perf_counter() - began


def main(data: Path) -> None:
    builds = {
        "ours": _ours(data),
        "litdata": _theirs(lambda: lit.loader_of(str(data / "litdata"), WORKERS)),
        "mosaic": _theirs(lambda: mosaic.loader_of(str(data / "mds"), WORKERS, "pil")),
    }
    found: dict[str, Any] = {}
    for name, build in builds.items():
        try:
            pairs = [(seconds(build, 0), seconds(build, HALF)) for _ in range(TIMES)]
        except Exception as error:
            found[name] = {"absent": f"{type(error).__name__}: {error}"[:300]}
            continue
        fresh, midway = (round(statistics.median(column), 3) for column in zip(*pairs, strict=True))
        found[name] = {"title": LOADERS[name].title, "fresh_s": fresh, "midway_s": midway, "step": HALF}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
