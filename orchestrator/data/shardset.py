"""The index of a set of shards as it is written: counts added up, sizes in a histogram."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.data.index import INDEX_NAME, KIND, SCHEMA
from orchestrator.data.pack import ShardFacts, add_counts
from orchestrator.files import write_json

MOST_SIZES = 40


def index_body(name: str, classes: tuple[str, ...], shards: list[ShardFacts]) -> dict[str, Any]:
    """wids' own form plus sha256, class counts and what was converted or left out; shards without samples stay out."""
    counts = add_counts([shard.class_counts for shard in shards])
    ignored = add_counts([shard.ignored for shard in shards])
    body = {
        "schema": SCHEMA,
        "__kind__": KIND,
        "wids_version": 1,
        "name": name,
        "shardlist": [
            {"url": s.file, "nsamples": s.nsamples, "filesize": s.filesize, "sha256": s.sha256}
            for s in shards
            if s.nsamples
        ],
        "classes": list(classes),
        "class_counts": [counts.get(str(i), 0) for i in range(len(classes))],
        "size_histogram": bucket_sizes(add_counts([shard.sizes for shard in shards])),
        "converted": add_counts([shard.converted for shard in shards]),
        "skipped": sum(len(shard.bad) for shard in shards),
    }
    return body | {"ignored_members": ignored} if ignored else body


def write_index(folder: Path, body: dict[str, Any]) -> None:
    write_json(folder / INDEX_NAME, body)


def bucket_sizes(sizes: dict[str, int]) -> dict[str, int]:
    """WIDTHxHEIGHT counts, commonest first; more than 40 different ones become powers of two of the longer side."""
    if len(sizes) <= MOST_SIZES:
        return dict(sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0])))
    buckets: dict[int, int] = {}
    for size, count in sizes.items():
        power = (max(int(side) for side in size.split("x")) - 1).bit_length()
        buckets[power] = buckets.get(power, 0) + count
    return {f"longer side {(1 << power >> 1) + 1}-{1 << power}": n for power, n in sorted(buckets.items())}
