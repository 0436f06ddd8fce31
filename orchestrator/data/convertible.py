"""The tars that a conversion reads: those of an index, or those of a folder or pattern that has none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.index import INDEX_NAME, ShardIndex, load_index, read_members, require_size
from orchestrator.data.indexing import find_tars
from orchestrator.data.members import list_first
from orchestrator.data.remote import is_url
from orchestrator.errors import DataError


@dataclass(frozen=True, slots=True)
class SourceTar:
    """One tar; `sha256` is empty and `stamp` is its time of change in ns where no index states the hash."""

    path: str
    size: int
    label: str
    sha256: str
    stamp: int
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceSet:
    """Tars of one folder; `classes` is None where no index names them."""

    name: str
    folder: Path
    tars: tuple[SourceTar, ...]
    images: int
    classes: tuple[str, ...] | None


def open_set(location: str) -> SourceSet:
    """The tars of a folder or pattern. Raises DataError where they are missing, remote or not as the index says."""
    tars = find_tars(location)
    folder = tars[0].parent
    if (folder / INDEX_NAME).exists():
        return _indexed(location, folder, tars)
    found = tuple(SourceTar(str(tar), tar.stat().st_size, "cls", "", tar.stat().st_mtime_ns) for tar in tars)
    images = sum(len(read_members(tar, "cls").keys) for tar in tars)
    return SourceSet(folder.resolve().name, folder, found, images, None)


def _indexed(location: str, folder: Path, tars: list[Path]) -> SourceSet:
    index = load_index(str(folder))
    _require_local(index)
    known = {Path(shard.location).resolve(): shard for shard in index.shards}
    whole = Path(location).expanduser().is_dir()
    wanted = list(known) if whole else [tar.resolve() for tar in tars]
    unknown = [str(tar) for tar in wanted if tar not in known]
    missing = [str(tar) for tar in wanted if not tar.is_file()]
    if unknown or missing:
        raise DataError(
            f"{folder / INDEX_NAME}: {len(unknown)} tars are not in the index, {len(missing)} of it do not exist:\n"
            f"{list_first(unknown + missing)}\nWay out: `orchestrator shards index {folder}`"
        )
    for tar in wanted:
        require_size(tar, known[tar])
    shards = [known[tar] for tar in wanted]
    found = tuple(SourceTar(s.location, s.filesize, s.label, s.sha256, 0, s.classes) for s in shards)
    return SourceSet(index.name, folder, found, sum(shard.nsamples for shard in shards), index.classes)


def _require_local(index: ShardIndex) -> None:
    remote = [shard.location for shard in index.shards if is_url(shard.location)]
    if remote:
        raise DataError(
            f"{index.location}: {len(remote)} shards are not on this machine:\n{list_first(remote)}\n"
            "Way out: download them, or convert where they lie"
        )
