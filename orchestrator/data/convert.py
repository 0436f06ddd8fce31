"""Tars that exist become crop-ready: the same members in the same order, only JPEGs rewritten; killed, it goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.data.claim import PARTS, claim, facts_path, finished_part, locked, read_or_none
from orchestrator.data.convertible import SourceSet, SourceTar, open_set
from orchestrator.data.crop_ready import is_ready, make_crop_ready
from orchestrator.data.images import MAX_PIXELS, ImageError, decode_image
from orchestrator.data.index import INDEX_NAME
from orchestrator.data.indexing import describe_tar
from orchestrator.data.kernel import Kernel, load_kernel
from orchestrator.data.members import IMAGE_EXTENSIONS, Member
from orchestrator.data.pack import CROP_READY, ImageRules, ShardFacts, Stopped, add_counts, store_image
from orchestrator.data.pool import choose_workers, run_all
from orchestrator.data.retar import rewrite_tar
from orchestrator.data.shardset import index_body, write_index
from orchestrator.data.sources import require_flags
from orchestrator.data.verify import Fault
from orchestrator.errors import DataError
from orchestrator.files import disk_errors, hash_file, replacing, write_json

VERB = "shards convert"
JPEG = frozenset({"jpg", "jpeg"})
JPEG_START = b"\xff\xd8"
NO_JPEG, READY, GROWS, SPECIAL, DAMAGED = "no JPEG", "ready before", "would grow", "CMYK or turned", "damaged"

Progress = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""(description, total, unit) -> a context that yields advance(n)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """What becomes of the JPEGs; without sizes and quality nothing of them is lost."""

    short_side: int | None = None
    max_side: int | None = None
    quality: int | None = None
    workers: int | None = None
    """Processes; None: one per core where there is work for them."""
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        require_flags(
            ("--short-side", self.short_side, 1, 65535),
            ("--max-side", self.max_side, 1, 65535),
            ("--quality", self.quality, 1, 100),
            ("--workers", self.workers, 1, 1024),
            ("--max-pixels", self.max_pixels, 1, 1 << 40),
        )

    @property
    def rules(self) -> ImageRules:
        return ImageRules(
            format="keep",
            quality=self.quality,
            max_side=self.max_side,
            short_side=self.short_side,
            crop_ready=True,
            max_pixels=self.max_pixels,
        )


@dataclass(frozen=True, slots=True)
class ConvertTask:
    """All that a process needs to convert one tar."""

    source: SourceTar
    path: str
    digest: str
    rules: ImageRules


@dataclass(kw_only=True, slots=True)
class ConvertedFacts(ShardFacts):
    """What one converted tar holds, and what became of its images."""

    images: int = 0
    left: dict[str, int] = field(default_factory=dict)
    """Why images stayed as they were, and how many."""
    bytes_before: int = 0
    bytes_after: int = 0
    damaged: list[str] = field(default_factory=list)


def plan_conversion(location: str, out: Path, options: ConvertOptions) -> dict[str, Any]:
    """What `convert_shards` would read; nothing is written. Raises the same errors."""
    source = _open(location, out)
    size = sum(tar.size for tar in source.tars)
    rules = {"short_side": options.short_side, "max_side": options.max_side, "quality": options.quality}
    return {"name": source.name, "shards": len(source.tars), "images": source.images, "bytes": size} | rules


def convert_shards(location: str, out: Path, options: ConvertOptions, progress: Progress) -> dict[str, Any]:
    """Write every tar of a set crop-ready to `out`, then `shards.json`; returns its body and facts of the conversion.

    The same source and options give the same bytes, whatever the number of workers and however often it was killed.
    Images that cannot be rewritten stay as they were and are counted. Raises DataError for damaged or incomplete tars,
    without the compiled kernel, and for a folder that holds something else; NodeError where the disk is full.
    """
    source = _open(location, out)
    digest = _digest(source, options)
    with disk_errors(out), locked(out, VERB):
        claim(out, digest, VERB)
        finished = read_or_none(out / INDEX_NAME)
        if finished is None:
            facts = _convert_all(_tasks(source, out, digest, options), source, options, progress)
            finished = _body(source, digest, facts)
            write_index(out, finished)
        shutil.rmtree(out / PARTS, ignore_errors=True)
        return finished


def _open(location: str, out: Path) -> SourceSet:
    require_kernel()
    source = open_set(location)
    if out.resolve() == source.folder.resolve():
        raise DataError(f"OUT = {out}: is where the tars lie, which are not overwritten. Way out: name another folder")
    return source


def require_kernel() -> Kernel:
    kernel = load_kernel()
    if isinstance(kernel, str):
        raise DataError(
            f"{VERB}: rewriting JPEGs takes the compiled kernel, which is {kernel}; nothing was written. "
            "Way out: install a C compiler (e.g. the package gcc) and `make install` again, or convert on a machine "
            "that has one: the shards are read everywhere"
        )
    return kernel


def _digest(source: SourceSet, options: ConvertOptions) -> str:
    """Everything that decides the bytes of the set."""
    from PIL import __version__ as pillow

    head = {"classes": source.classes, "name": source.name, "rules": asdict(options.rules), "pillow": pillow}
    tars = [(Path(tar.path).name, tar.size, tar.label, tar.sha256 or tar.stamp) for tar in source.tars]
    return hashlib.sha256(json.dumps([VERB, head, tars], sort_keys=True).encode()).hexdigest()


def _tasks(source: SourceSet, out: Path, digest: str, options: ConvertOptions) -> list[ConvertTask]:
    return [ConvertTask(tar, str(out / Path(tar.path).name), digest, options.rules) for tar in source.tars]


def _convert_all(
    tasks: list[ConvertTask], source: SourceSet, options: ConvertOptions, progress: Progress
) -> list[ConvertedFacts]:
    done = {task.path: body for task in tasks if (body := finished_part(Path(task.path), task.digest))}
    left = [task for task in tasks if task.path not in done]
    workers = options.workers or choose_workers(source.images, sum(task.source.size for task in left))
    with progress("converting", source.images, "images") as advance:
        advance(sum(body["images"] for body in done.values()))
        converted = run_all(convert_shard, left, workers, advance) if left else []
    done |= {task.path: asdict(facts) for task, facts in zip(left, converted, strict=True)}
    return [ConvertedFacts(**done[task.path]) for task in tasks]


def _body(source: SourceSet, digest: str, facts: list[ConvertedFacts]) -> dict[str, Any]:
    highest = max((int(number) for shard in facts for number in shard.class_counts), default=-1)
    classes = source.classes or tuple(str(i) for i in range(highest + 1))
    if len(classes) <= highest:
        raise DataError(
            f"{source.folder / INDEX_NAME}: {len(classes)} classes, but label {highest} is in use. "
            "Way out: `orchestrator shards index` with a --classes file that has a name per class"
        )
    body = index_body(source.name, classes, list(facts))
    labels = {Path(tar.path).name: tar.label for tar in source.tars}
    for entry in body["shardlist"]:
        if labels[entry["url"]] != "cls":
            entry["label"] = labels[entry["url"]]
    conversion = {
        "images": sum(shard.images for shard in facts),
        "left": add_counts([shard.left for shard in facts]),
        "bytes_before": sum(shard.bytes_before for shard in facts),
        "bytes_after": sum(shard.bytes_after for shard in facts),
        "damaged": [line for shard in facts for line in shard.damaged],
    }
    return body | {"conversion": conversion, "plan": digest}


def convert_shard(task: ConvertTask, tick: Callable[[], None], stopped: Callable[[], bool]) -> ConvertedFacts:
    """Write tar, `.idx` and facts of one shard. Raises DataError for a damaged tar, Stopped, OSError of the disk."""
    source, path = Path(task.source.path), Path(task.path)
    _require_hash(source, task.source.sha256)
    seen = ConvertedFacts(file=path.name, digest=task.digest)

    def change(member: Member, data: bytes) -> bytes:
        if stopped():
            raise Stopped
        image = rewrite_image(data, task.rules) if member.extension in JPEG else Rewritten(data, left=NO_JPEG)
        _count(seen, member, len(data), image)
        tick()
        return image.data

    with replacing(path) as file:
        rewrite_tar(source, file, IMAGE_EXTENSIONS, change)
    described = asdict(describe_tar(path, task.source.label, task.source.classes)) | {
        "digest": task.digest,
        "converted": seen.converted,
    }
    own = {name: getattr(seen, name) for name in ("images", "left", "bytes_before", "bytes_after", "damaged")}
    facts = ConvertedFacts(**described, **own)
    write_json(facts_path(path), asdict(facts))
    return facts


def _count(seen: ConvertedFacts, member: Member, size: int, image: Rewritten) -> None:
    seen.images += 1
    seen.bytes_before += size
    seen.bytes_after += len(image.data)
    for name in sorted(image.conversions):
        seen.converted[name] = seen.converted.get(name, 0) + 1
    if image.left:
        seen.left[image.left] = seen.left.get(image.left, 0) + 1
    if image.fault:
        seen.damaged.append(str(Fault(seen.file, image.fault, member.name, member.offset)))


def _require_hash(path: Path, sha256: str) -> None:
    if sha256 and (found := hash_file(path)) != sha256:
        raise DataError(
            f"{path}: sha256 is {found}, the index says {sha256}. "
            "Way out: copy this shard again, or `orchestrator shards index` where it was changed on purpose"
        )


class Rewritten(NamedTuple):
    """The bytes that an image gets, and what was done to it or why nothing was."""

    data: bytes
    conversions: frozenset[str] = frozenset()
    left: str = ""
    fault: str = ""
    """What is wrong with a damaged one."""


def rewrite_image(data: bytes, rules: ImageRules) -> Rewritten:
    """A JPEG crop-ready, re-encoded only where sizes or quality ask for it; anything else as it was."""
    try:
        if not data.startswith(JPEG_START):
            decode_image(data, rules.max_pixels)
            return Rewritten(data, left=NO_JPEG)
        if rules.short_side or rules.max_side or rules.quality:
            stored = store_image(data, rules)
            left = _why_left(data) if stored.data is data else ""
            return Rewritten(stored.data, stored.conversions, left)
        return _rewrite_without_loss(data, rules.max_pixels)
    except ImageError as error:
        return Rewritten(data, left=DAMAGED, fault=str(error))


def _rewrite_without_loss(data: bytes, max_pixels: int) -> Rewritten:
    facts = require_kernel().describe(data)
    if facts is None or facts.width * facts.height > max_pixels:
        decode_image(data, max_pixels)
        return Rewritten(data, left=SPECIAL)
    ready = make_crop_ready(data)
    return Rewritten(ready, frozenset({CROP_READY})) if ready else Rewritten(data, left=_why_left(data))


def _why_left(data: bytes) -> str:
    """Why a JPEG cannot be made crop-ready. Raises ImageError where its coefficients cannot be read."""
    kernel = require_kernel()
    facts = kernel.describe(data)
    if facts is None:
        return SPECIAL
    if is_ready(facts):
        return READY
    if kernel.rewrite(data, facts.columns) is None:
        raise ImageError("corrupt compressed data")
    return GROWS
