"""A source becomes shard sets: planned, packed in parallel, indexed last; killed at any moment, it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.data.claim import PARTS, claim, clear, finished_part, locked, read_or_none
from orchestrator.data.index import INDEX_NAME
from orchestrator.data.members import list_first
from orchestrator.data.pack import ShardFacts, ShardTask
from orchestrator.data.plan import MakeOptions, SplitPlan, plan_split
from orchestrator.data.pool import pack_all
from orchestrator.data.shardset import index_body, write_index
from orchestrator.data.sources import Source, SourceOptions, open_source
from orchestrator.errors import DataError
from orchestrator.files import disk_errors

VERB = "shards make"
SCRATCH = ".scratch"

Progress = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""(description, total, unit) -> a context that yields advance(n)."""


def plan_shards(spec: str, source_options: SourceOptions, options: MakeOptions) -> dict[str, Any]:
    """What `make_shards` would write; nothing is written."""
    source = open_source(spec, replace(source_options, scratch=None))
    plans = _plans(source, options)
    splits = {plan.split: {"samples": plan.num_samples, "shards": len(plan.shards)} for plan in plans}
    return {"name": source.name, "classes": len(source.classes), "ignored_files": source.ignored, "splits": splits}


def make_shards(
    spec: str, out: Path, source_options: SourceOptions, options: MakeOptions, progress: Progress
) -> dict[str, Any]:
    """Write OUT/train and, where there is one, OUT/val; returns facts per split.

    The same source and options give the same bytes, whatever the number of workers and however often it was killed.
    Raises DataError for bad images (all of them, after looking at all) and for a folder that holds something else,
    NodeError where the disk is full.
    """
    with disk_errors(out), locked(out, VERB):
        return _make(spec, out, source_options, options, progress)


def _make(
    spec: str, out: Path, source_options: SourceOptions, options: MakeOptions, progress: Progress
) -> dict[str, Any]:
    scratch = out / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        source = open_source(spec, replace(source_options, scratch=scratch))
        plans = _plans(source, options)
        tasks = {plan.split: _tasks(plan, out / plan.split, source, options) for plan in plans}
        for plan in plans:
            claim(out / plan.split, plan.digest, VERB)
        bodies = _pack_splits(source, out, plans, tasks, (options, progress))
        return {"name": source.name, "ignored_files": source.ignored, "splits": bodies}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _plans(source: Source, options: MakeOptions) -> list[SplitPlan]:
    return [plan_split(source, split, options) for split in ("train", "val") if source.splits.get(split)]


def _tasks(plan: SplitPlan, folder: Path, source: Source, options: MakeOptions) -> list[ShardTask]:
    return [
        ShardTask(str(folder / plan.shard_name(i)), plan.shard_digest(i), samples, source.read, options.rules)
        for i, samples in enumerate(plan.shards)
    ]


def _pack_splits(
    source: Source,
    out: Path,
    plans: list[SplitPlan],
    tasks: dict[str, list[ShardTask]],
    how: tuple[MakeOptions, Progress],
) -> dict[str, Any]:
    options, progress = how
    finished = {p.split: body for p in plans if (body := read_or_none(out / p.split / INDEX_NAME))}
    wanted = [task for plan in plans if plan.split not in finished for task in tasks[plan.split]]
    done = {task.path: facts for task in wanted if (facts := _finished(task))}
    left = [task for task in wanted if task.path not in done]
    if left:
        with progress("packing", sum(len(task.samples) for task in wanted), "images") as advance:
            advance(sum(len(task.samples) for task in wanted if task.path in done))
            packed = pack_all(left, options.workers, advance)
        done |= {task.path: facts for task, facts in zip(left, packed, strict=True)}
    if options.on_bad == "fail":
        _require_no_bad(out, [plan.split for plan in plans if plan.split not in finished], list(done.values()))
    for plan in plans:
        if plan.split not in finished:
            facts = [done[task.path] for task in tasks[plan.split]]
            finished[plan.split] = _finish(source, out / plan.split, plan, facts)
        shutil.rmtree(out / plan.split / PARTS, ignore_errors=True)
    return finished


def _finished(task: ShardTask) -> ShardFacts | None:
    body = finished_part(Path(task.path), task.digest)
    return ShardFacts(**body) if body else None


def _require_no_bad(out: Path, splits: list[str], facts: list[ShardFacts]) -> None:
    bad = sorted(line for shard in facts for line in shard.bad)
    if not bad:
        return
    for split in splits:
        clear(out / split)
        (out / split).rmdir()
    raise DataError(
        f"{len(bad)} images cannot be used, nothing was written:\n{list_first(bad)}\n"
        "Way out: mend or delete them, or --on-bad skip leaves them out and counts them"
    )


def _finish(source: Source, folder: Path, plan: SplitPlan, facts: list[ShardFacts]) -> dict[str, Any]:
    """Drop shards that lost every image, then write the index: from here on the set exists."""
    for shard in facts:
        if not shard.nsamples:
            (folder / shard.file).unlink()
            for suffix in (".idx", ".crc"):
                (folder / shard.file).with_suffix(suffix).unlink(missing_ok=True)
    body = index_body(f"{source.name}-{plan.split}", source.classes, facts)
    if not body["shardlist"]:
        clear(folder)
        folder.rmdir()
        bad = [line for shard in facts for line in shard.bad]
        raise DataError(f"{source.name}: none of {len(bad)} {plan.split} images can be used:\n{list_first(bad)}")
    body["plan"] = plan.digest
    write_index(folder, body)
    return body
