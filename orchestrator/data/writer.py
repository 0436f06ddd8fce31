"""A source becomes shard sets: planned, packed in parallel, indexed last; killed at any moment, it goes on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.data.index import INDEX_NAME
from orchestrator.data.members import list_first
from orchestrator.data.pack import ShardFacts, ShardTask, facts_path
from orchestrator.data.plan import MakeOptions, SplitPlan, plan_split
from orchestrator.data.pool import pack_all
from orchestrator.data.shardset import index_body, write_index
from orchestrator.data.sources import Source, SourceOptions, open_source
from orchestrator.errors import DataError
from orchestrator.files import disk_errors, write_json

SCRATCH = ".scratch"
PARTS = ".parts"

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
    with disk_errors(out), _locked(out):
        return _make(spec, out, source_options, options, progress)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One packing per folder: the lock on the folder itself ends with the process and leaves nothing."""
    out.mkdir(parents=True, exist_ok=True)
    fd = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(
            f"{out}: another `shards make` is writing here. Way out: wait for it, or name another folder"
        ) from None
    finally:
        os.close(fd)


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
            _claim(out / plan.split, plan)
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


def _claim(folder: Path, plan: SplitPlan) -> None:
    """Make the folder ready for this plan, keeping shards that an earlier start of the same plan finished."""
    folder.mkdir(exist_ok=True)
    index = _read_json(folder / INDEX_NAME)
    marker = folder / PARTS / "plan.json"
    if index and index.get("plan") == plan.digest:
        if _is_complete(folder, index):
            return
        (folder / INDEX_NAME).unlink()
        _clear(folder)
    elif index or (not marker.is_file() and any(folder.glob("*.tar"))):
        raise DataError(
            f"{folder}: holds another shard set, which `shards make` does not overwrite. "
            "Way out: name another folder or delete this one"
        )
    if (_read_json(marker) or {}).get("digest") != plan.digest:
        _clear(folder)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    marker.parent.mkdir(exist_ok=True)
    write_json(marker, {"digest": plan.digest})


def _is_complete(folder: Path, index: dict[str, Any]) -> bool:
    files = [(folder / shard["url"], shard["filesize"]) for shard in index["shardlist"]]
    return all(
        path.is_file() and path.stat().st_size == size and path.with_suffix(".idx").is_file() for path, size in files
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _clear(folder: Path) -> None:
    """Remove what an unfinished packing wrote."""
    for pattern in ("*.tar", "*.idx", ".*.tmp"):
        for path in folder.glob(pattern):
            path.unlink()
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def _pack_splits(
    source: Source,
    out: Path,
    plans: list[SplitPlan],
    tasks: dict[str, list[ShardTask]],
    how: tuple[MakeOptions, Progress],
) -> dict[str, Any]:
    options, progress = how
    finished = {p.split: body for p in plans if (body := _read_json(out / p.split / INDEX_NAME))}
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
    path = Path(task.path)
    body = _read_json(facts_path(path))
    if not body or body["digest"] != task.digest:
        return None
    whole = path.is_file() and path.stat().st_size == body["filesize"] and path.with_suffix(".idx").is_file()
    return ShardFacts(**body) if whole else None


def _require_no_bad(out: Path, splits: list[str], facts: list[ShardFacts]) -> None:
    bad = sorted(line for shard in facts for line in shard.bad)
    if not bad:
        return
    for split in splits:
        _clear(out / split)
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
            (folder / shard.file).with_suffix(".idx").unlink()
    body = index_body(f"{source.name}-{plan.split}", source.classes, facts)
    if not body["shardlist"]:
        _clear(folder)
        folder.rmdir()
        bad = [line for shard in facts for line in shard.bad]
        raise DataError(f"{source.name}: none of {len(bad)} {plan.split} images can be used:\n{list_first(bad)}")
    body["plan"] = plan.digest
    write_index(folder, body)
    return body
