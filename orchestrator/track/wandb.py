"""The mirror of a run in Weights & Biases: background threads do all of it, so that training never waits."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.config import TrackingConfig
from orchestrator.options import TrackingMode
from orchestrator.track.artifacts import add_checkpoint, add_confusion, add_shard_index
from orchestrator.track.runs import load_run
from orchestrator.track.session import (
    UPLOAD_TIMEOUT_S,
    Plan,
    end_service,
    first_line,
    init_run,
    open_online,
    turn_telemetry_off,
)

if TYPE_CHECKING:
    from pytorch_lightning.loggers import WandbLogger
    from wandb import Run

logger = logging.getLogger(__name__)

ARTIFACT_TIMEOUT_S = 8.0
"""How long the end of a run waits for the server to take artifacts on; their upload comes after."""

FINISH_TIMEOUT_S = ARTIFACT_TIMEOUT_S + UPLOAD_TIMEOUT_S + 2.0

Task = Callable[["WandbLogger"], None]


class Tracker(Protocol):
    """What training needs of a mirror; every call but `finish` returns at once."""

    @property
    def url(self) -> str | None: ...
    @property
    def folder(self) -> Path | None: ...
    def log(self, metrics: Mapping[str, Any]) -> None: ...
    def log_images(self, name: str, paths: Sequence[Path], captions: Sequence[str]) -> None: ...
    def log_confusion(self, matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> None: ...
    def log_checkpoint(self, folder: Path, aliases: Sequence[str], metadata: Mapping[str, Any]) -> None: ...
    def summary(self, values: Mapping[str, Any]) -> None: ...
    def finish(self, timeout_s: float = FINISH_TIMEOUT_S, exit_code: int = 0) -> str | None: ...


class NullTracker:
    """`tracking=disabled`: takes everything, keeps nothing, never imports wandb."""

    url: str | None = None
    folder: Path | None = None

    def log(self, metrics: Mapping[str, Any]) -> None: ...
    def log_images(self, name: str, paths: Sequence[Path], captions: Sequence[str]) -> None: ...
    def log_confusion(self, matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> None: ...
    def log_checkpoint(self, folder: Path, aliases: Sequence[str], metadata: Mapping[str, Any]) -> None: ...
    def summary(self, values: Mapping[str, Any]) -> None: ...
    def finish(self, timeout_s: float = 0.0, exit_code: int = 0) -> str | None: ...


def start(
    config: TrackingConfig,
    run_folder: Path,
    run_id: str,
    name: str,
    run_config: Mapping[str, Any],
    on_url: Callable[[str], None] | None = None,
) -> Tracker:
    """Begin to mirror a run; called by rank 0 alone, once per attempt.

    `on_url` is called from the background thread as soon as an online run has an address. The shard sets are taken from
    the `data` of run.json.
    """
    if config.mode is TrackingMode.disabled:
        return NullTracker()
    return WandbTracker(Plan(config, run_folder, run_id, name, run_config, on_url))


@dataclass(slots=True)
class _Outcome:
    """What the background thread tells the others."""

    url: str | None = None
    folder: Path | None = None
    uploaded: bool = False
    exit_code: int = 0
    warned: set[str] = field(default_factory=set)


class WandbTracker:
    """Queues what is logged; its thread starts W&B, drains the queue in order and ends the W&B run."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._outcome = _Outcome()
        self._queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._finishing = threading.Event()
        self._aside: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._mirror, name="wandb-mirror", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str | None:
        """The run's page; None offline, and until the server has answered."""
        return self._outcome.url

    @property
    def folder(self) -> Path | None:
        """The W&B run folder of this attempt; None until W&B has started."""
        return self._outcome.folder

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Queue one row; `global_step` among the metrics is the x axis, a fraction counts as its value."""
        row = plain_row(metrics)
        self._queue.put(lambda mirror: mirror.log_metrics(row))

    def log_images(self, name: str, paths: Sequence[Path], captions: Sequence[str]) -> None:
        """Queue pictures; the files must stay until the run ends."""
        files, texts = [str(p) for p in paths], list(captions)
        self._queue.put(lambda mirror: mirror.log_image(name, files, caption=texts))

    def log_confusion(self, matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> None:
        """Queue the confusion matrix (rows = true class) as a chart of at most 10,000 cells."""
        self._queue.put(lambda m: self._set_aside(lambda: add_confusion(m.experiment, matrix, class_names)))

    def log_checkpoint(self, folder: Path, aliases: Sequence[str], metadata: Mapping[str, Any]) -> None:
        """Queue a checkpoint folder as an artifact of type `model`; the folder may be deleted afterwards."""
        kept = self._plan.run_folder / "wandb" / "checkpoints" / folder.name
        if not self._try("keep a checkpoint", lambda: _keep(folder, kept)):
            return
        name, names, facts = f"model-{self._plan.run_id}", list(aliases), dict(metadata)
        self._queue.put(lambda m: self._set_aside(lambda: add_checkpoint(m.experiment, name, kept, names, facts)))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Queue figures that stand for the whole run."""
        row = plain_row(values)
        self._queue.put(lambda mirror: mirror.experiment.summary.update(row))

    def finish(self, timeout_s: float = FINISH_TIMEOUT_S, exit_code: int = 0) -> str | None:
        """End the W&B run within `timeout_s`; returns the command that uploads what the server has not got, if any."""
        self._outcome.exit_code = exit_code
        self._queue.put(None)
        self._finishing.set()
        self._thread.join(timeout_s)
        if self._outcome.uploaded:
            return None
        if self._outcome.folder is None:
            return "W&B did not start: this attempt is recorded in the run folder only"
        live = "--include-online " if self._outcome.url else ""
        return f"wandb sync {live}{self._outcome.folder}"

    def _mirror(self) -> None:
        self._try("turn its telemetry off", turn_telemetry_off)
        opened: list[WandbLogger] = []
        self._try("start", lambda: opened.append(self._open()))
        if not opened:
            return
        mirror = opened[0]
        while (task := self._queue.get()) is not None:
            self._try("log", lambda task=task: task(mirror))
        ended = self._try("finish", lambda: self._close(mirror.experiment))
        self._outcome.uploaded = ended and self._outcome.url is not None

    def _try(self, what: str, action: Callable[[], Any]) -> bool:
        """Run one action; W&B's errors (its teardown calls `sys.exit`) never reach training and are told once."""
        try:
            action()
        except (Exception, SystemExit) as error:
            if what not in self._outcome.warned:
                self._outcome.warned.add(what)
                logger.warning("W&B could not %s: %s: %s", what, type(error).__name__, first_line(error))
            return False
        return True

    def _set_aside(self, action: Callable[[], Any]) -> None:
        """Do what waits for the server's answer in a thread of its own, so that metrics flow on."""
        thread = threading.Thread(target=lambda: self._try("log an artifact", action), daemon=True)
        thread.start()
        self._aside.append(thread)

    def _open(self) -> WandbLogger:
        live = open_online(self._plan, self._finishing) if self._plan.config.mode is TrackingMode.online else None
        run = live or init_run(self._plan, "offline")
        self._outcome.folder = Path(run.settings.sync_dir)
        if live is not None and live.url:
            self._outcome.url = live.url
            self._try("tell its address", lambda: self._plan.on_url and self._plan.on_url(str(live.url)))
        self._set_aside(lambda: add_shard_index(run, load_run(self._plan.run_folder).data))
        return _lightning_logger(self._plan.config.project, run)

    def _close(self, run: Run) -> None:
        end = time.monotonic() + ARTIFACT_TIMEOUT_S
        for thread in self._aside:
            thread.join(max(0.0, end - time.monotonic()))
        try:
            run.finish(exit_code=self._outcome.exit_code)
            if not run.offline:
                shutil.rmtree(self._plan.run_folder / "wandb" / "checkpoints", ignore_errors=True)
        finally:
            end_service()


def _lightning_logger(project: str, run: Run) -> WandbLogger:
    from pytorch_lightning.loggers import WandbLogger

    return WandbLogger(project=project, experiment=run)


def plain_row(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A row as W&B draws it: fractions `{hits, count, value}` become their value, missing figures are left out."""
    values = {k: v["value"] if isinstance(v, Mapping) and "value" in v else v for k, v in metrics.items()}
    return {k: v for k, v in values.items() if v is not None}


def _keep(folder: Path, kept: Path) -> None:
    """Hard-link a checkpoint beside the W&B run, so that it survives `checkpointing.keep_last` without a copy."""
    kept.mkdir(parents=True, exist_ok=True)
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        target = kept / file.name
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copy2(file, target)
