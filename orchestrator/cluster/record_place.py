"""Where the nodes of a run keep its record: a folder that all of them see, or an object store that each is equal to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from orchestrator.bundle import Bundle, with_config, write_bundle
from orchestrator.cluster.record import is_finished
from orchestrator.cluster.stored import StoredRecord
from orchestrator.data.cache import cache_root
from orchestrator.secrets import use_for_stores


class Record(Protocol):
    """What a node's launcher does for the record."""

    hang_up_s: float
    """How long the first node waits for the others to have read the verdict."""

    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        ...

    def claim(self) -> None:
        """Of the first node: become the one that writes what there is once a run."""

    def begin(self, attempt: int, ranks: range) -> None:
        """Of the first node: an attempt begins, with these ranks here."""

    def join(self, attempt: int, ranks: range) -> None:
        """Of another node: take part with these ranks."""

    def check(self) -> None:
        """Raises RecordTaken where another start of the run has the record now."""

    def flush(self, limit_s: float) -> str | None:
        """Have the whole record where it is kept; why not, where that takes longer. Raises RecordTaken."""
        ...

    def close(self) -> None: ...


class SharedRecord:
    """A folder on a disk that all nodes share, or the only node's: what is written is there."""

    hang_up_s = 3.0

    def __init__(self, folder: Path):
        self._folder = folder

    def is_finished(self) -> bool:
        return is_finished(self._folder)

    def claim(self) -> None: ...

    def begin(self, attempt: int, ranks: range) -> None: ...

    def join(self, attempt: int, ranks: range) -> None: ...

    def check(self) -> None: ...

    def flush(self, limit_s: float) -> str | None:
        return None

    def close(self) -> None: ...


def open_record(sent: Bundle, path: Path, node: int) -> tuple[Record, Bundle, Path]:
    """The record, and the bundle with its path as this node's ranks take them; `path` is that of `sent`."""
    runs_dir = sent.config.runs_dir
    if "://" not in runs_dir:
        return SharedRecord(sent.folder), sent, path
    use_for_stores(sent.config.cluster.store_secret)
    here = cache_root() / "runs" / f"node_{node}"
    saving = replace(sent.config.checkpointing, mirror=runs_dir)
    bundle = with_config(sent, replace(sent.config, runs_dir=str(here), checkpointing=saving))
    bundle.folder.mkdir(parents=True, exist_ok=True)
    own = here / f"{bundle.run_id}.json"
    write_bundle(bundle, own, {})
    return StoredRecord(f"{runs_dir.rstrip('/')}/{bundle.run_id}", bundle.folder), bundle, own
