"""``python -m tests.bench.loaders.remote_epoch NAME BUCKET CACHE``: one epoch of one loader from an object store.

The seconds are those from building the loader, which reads its index, to the last batch; imports are left out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tests.bench.loaders import BATCH, lit, mosaic, ours
from tests.bench.loaders.sets import IMAGES

WORKERS = 2
BATCHES = IMAGES // BATCH - 1
"""One less than an epoch has: what drops the last samples of each worker has no more."""

Build = Callable[[], Iterator[Any]]


def _ours(place: str, cache: str) -> Build:
    os.environ["ORCHESTRATOR_CACHE"] = cache
    import orchestrator.data.stream  # noqa: F401 (its import is not measured)

    shards = f"{place}/crop_ready/train"
    config = ours.config_of(shards, WORKERS, "fast")
    return lambda: iter(ours.loader_of(shards, config, range(BATCHES)))


def _litdata(place: str, cache: str) -> Build:
    from litdata.streaming import downloader

    # it has no setting for an S3 store without TLS on its asynchronous path
    downloader._OBSTORE_CLIENT_OPTIONS = {**(downloader._OBSTORE_CLIENT_OPTIONS or {}), "allow_http": True}
    return lambda: iter(lit.loader_of(f"{place}/litdata_16mb", WORKERS, cache))


def _mosaic(place: str, cache: str) -> Build:
    import streaming  # noqa: F401 (its import is not measured)

    return lambda: iter(mosaic.loader_of(f"{place}/mds_bytes", WORKERS, "io", cache))


PREPARE = {"ours": _ours, "litdata": _litdata, "mosaic_io": _mosaic}
"""Loader of the catalogue -> what imports it and returns how its batches are begun."""


def epoch(build: Build) -> dict[str, float]:
    """Seconds to the first batch, and images/s up to the last."""
    began = time.perf_counter()
    batches = build()
    next(batches)
    first = time.perf_counter() - began
    taken = 1 + sum(1 for _ in islice(batches, BATCHES - 1))
    assert taken == BATCHES, f"{taken} batches"
    return {"images_per_s": round(BATCHES * BATCH / (time.perf_counter() - began), 1), "first_batch_s": round(first, 2)}


def main(name: str, place: str, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    print(json.dumps(epoch(PREPARE[name](place, str(cache)))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)
