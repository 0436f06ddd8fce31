"""An index for tars that others made: every member header and label is read, no image is decoded."""

from __future__ import annotations

import glob
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from orchestrator.data.images import SHARD_FORMATS
from orchestrator.data.index import INDEX_NAME, Members, read_body, read_members, read_sample
from orchestrator.data.labels import is_number, split_label
from orchestrator.data.members import IMAGE_EXTENSIONS, Member, group_samples, list_first, scan_members, write_idx
from orchestrator.data.pack import ShardFacts
from orchestrator.data.remote import is_url
from orchestrator.data.shardset import index_body, write_index
from orchestrator.data.sums import write_sums
from orchestrator.errors import DataError
from orchestrator.files import disk_errors, hash_file

CHUNK = 1 << 20


def find_tars(location: str) -> list[Path]:
    """The tars of a folder, in the order of their names, or of a brace or glob pattern.

    Raises DataError where there is none or they lie in more than one folder.
    """
    if is_url(location):
        raise DataError(f"{location}: only local tars can be indexed. Way out: download them, or index where they lie")
    root = Path(location).expanduser()
    tars = sorted(root.glob("*.tar")) if root.is_dir() else _expand(location)
    if not tars:
        raise DataError(
            f"{location}: no .tar there. Way out: a folder of tars, or a pattern such as 'x-{{000..009}}.tar'"
        )
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if missing:
        raise DataError(
            f"{location}: {len(missing)} tars do not exist:\n{list_first(missing)}\nWay out: mend the pattern"
        )
    if len({tar.parent.resolve() for tar in tars}) > 1:
        raise DataError(
            f"{location}: tars of several folders. Way out: index each folder, one index lies beside its tars"
        )
    return tars


def _expand(location: str) -> list[Path]:
    from braceexpand import braceexpand

    try:
        places = list(braceexpand(location))
    except ValueError as error:
        raise DataError(f"{location}: {error}. Way out: e.g. train-{{000000..000009}}.tar") from error
    found = [sorted(glob.glob(place)) if glob.has_magic(place) else [place] for place in places]
    return [Path(path) for paths in found for path in paths]


def index_tars(
    location: str, label: str, classes_file: str | None, advance: Callable[[int], None]
) -> tuple[Path, dict[str, Any]]:
    """Write `.idx` and sums beside each tar and `shards.json` beside them all; returns its folder and content.

    `label` is the extension of the members that hold the class number or name, or json:FIELD of JSON members. Class
    names come from the file, else from an older index that has enough of them, else they are the names that stand in
    the tars in alphabetical order, or the numbers. Raises DataError.
    """
    label = normal_label(label)
    tars = find_tars(location)
    folder = tars[0].parent
    names = read_classes(Path(classes_file)) if classes_file else _names_in(folder, tars, label)
    shards = []
    for tar in tars:
        shards.append(describe_tar(tar, label, names or ()))
        advance(1)
    highest = max((int(number) for shard in shards for number in shard.class_counts), default=-1)
    if names is not None and len(names) <= highest:
        raise DataError(f"{classes_file}: {len(names)} names, but label {highest} is in use. Way out: a name per class")
    names = names or _names_of_older_index(folder, highest) or tuple(str(i) for i in range(highest + 1))
    body = index_body(folder.resolve().name, names, shards)
    if label != "cls":
        for entry in body["shardlist"]:
            entry["label"] = label
    if not body["shardlist"]:
        raise DataError(f"{location}: no sample in {len(tars)} tars. Way out: an image and a label per sample")
    write_index(folder, body)
    return folder, body


def normal_label(label: str) -> str:
    """Extensions are compared in lower case; raises DataError for what cannot be one."""
    extension, colon, field = label.partition(":")
    extension = extension.lstrip(".").lower()
    if not extension or (colon and (extension != "json" or not field)):
        raise DataError(
            f"--label = {label}: must be an extension or json:FIELD. Way out: --label cls, --label json:label"
        )
    return f"{extension}{colon}{field}"


def _names_in(folder: Path, tars: list[Path], label: str) -> tuple[str, ...] | None:
    """The labels if they are names, or the classes of an older index that has them all; None where they are numbers.

    Raises DataError for names among numbers.
    """
    names: set[str] = set()
    for tar in tars:
        with tar.open("rb") as file:
            for sample in group_samples(scan_members(tar)):
                with suppress(ValueError):  # told with all others when the tar is described
                    names.add(read_sample(file.fileno(), sample, label)[1])
                if len(names) == 1 and is_number(next(iter(names))):
                    return None
    mixed = sorted(filter(is_number, names))
    if mixed:
        raise DataError(
            f"{folder}: labels are names, but {', '.join(mixed[:5])} are numbers. Way out: one kind, or another --label"
        )
    older = _names_of_older_index(folder, len(names) - 1) or ()
    return older if names <= set(older) else tuple(sorted(names))


def _names_of_older_index(folder: Path, highest: int) -> tuple[str, ...] | None:
    """Indexing again after a change must not turn names into numbers."""
    if not (folder / INDEX_NAME).exists():
        return None
    try:
        classes = read_body(str(folder)).get("classes", [])
    except DataError:
        return None
    return tuple(map(str, classes)) if isinstance(classes, list) and len(classes) > highest else None


def describe_tar(tar: Path, label: str, classes: Sequence[str] = ()) -> ShardFacts:
    """What one tar holds, from the tar alone: an `.idx` that lies there is replaced, not believed."""
    samples = list(group_samples(scan_members(tar)))
    idx = tar.with_suffix(".idx")
    with disk_errors(tar.parent):
        idx.unlink(missing_ok=True)
        if not any(" " in member.name for sample in samples for member in sample):
            write_idx(idx, samples)
        write_sums(tar)
    members = read_members(tar, label, classes)
    counts = Counter(str(number) for number in members.label.tolist())
    return ShardFacts(
        file=tar.name,
        digest="",
        nsamples=len(members.keys),
        filesize=tar.stat().st_size,
        sha256=hash_file(tar),
        class_counts=dict(counts),
        sizes=_image_sizes(tar, members),
        ignored=_count_others(samples, split_label(label)[0]),
    )


def _count_others(samples: list[list[Member]], label: str) -> dict[str, int]:
    used = {*IMAGE_EXTENSIONS, label}
    return dict(Counter(member.extension for sample in samples for member in sample if member.extension not in used))


def _image_sizes(tar: Path, members: Members) -> dict[str, int]:
    """From the images' own headers; what has none is `verify`'s to name."""
    sizes: Counter[str] = Counter()
    with tar.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for offset, size in zip(members.image_offset.tolist(), members.image_size.tolist(), strict=True):
            try:
                with Image.open(io.BytesIO(os.pread(file.fileno(), size, offset)), formats=SHARD_FORMATS) as image:
                    sizes[f"{image.width}x{image.height}"] += 1
            except Exception:  # Pillow raises anything on damaged bytes
                continue
    return dict(sizes)


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names in the order of their numbers: a JSON list, or one to a line."""
    try:
        text = path.read_text(encoding="utf-8")
        names = (
            json.loads(text) if text.lstrip().startswith("[") else [line for line in text.splitlines() if line.strip()]
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Way out: a JSON list, or one class name to a line"
        ) from error
    return tuple(str(name).strip() for name in names)
