"""What a run leaves besides checkpoints: `result.json`, `evaluation.json`, pictures, the end of its mirror."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from orchestrator.bundle import Bundle
from orchestrator.data.images import decode_image
from orchestrator.data.index import ShardIndex
from orchestrator.data.reader import ShardReader
from orchestrator.files import read_json, write_json
from orchestrator.track.goodput import measure_run, summary
from orchestrator.track.runs import load_run
from orchestrator.track.wandb import Tracker
from orchestrator.train import checkpoint
from orchestrator.train.evaluate import Evaluation, Outcome
from orchestrator.train.ledger import PhaseClock
from orchestrator.train.process import Rank
from orchestrator.train.retention import best_folder

SCHEMA = 1
THUMBNAIL = 160
CONFUSION_CLASSES = 100


@dataclass(slots=True)
class Recorder:
    """Keeps `result.json` of a run true; used by the first rank alone."""

    bundle: Bundle
    rank: Rank
    clock: PhaseClock
    data_digest: str
    steps_per_epoch: int
    _earlier: dict[str, float] = field(default_factory=dict)
    """Seconds of the attempts before this one."""

    def __post_init__(self) -> None:
        path = self.bundle.folder / "result.json"
        self._earlier = read_json(path)["seconds"] if path.exists() else {}

    def saved(self, step: int, seconds: dict[str, float]) -> None:
        """A checkpoint is durable. `seconds` by phase when it was taken: this runs beside training."""
        self._write("running", None, step, {}, seconds)

    def stopped(self, step: int, exit_code: int) -> None:
        self._write("stopped", exit_code, step, {})

    def done(self, step: int, evaluation: Evaluation) -> None:
        self._write("done", 0, step, evaluation.metrics())

    def _write(
        self,
        state: str,
        exit_code: int | None,
        step: int,
        metrics: dict[str, Any],
        seconds: dict[str, float] | None = None,
    ) -> None:
        root = self.bundle.folder / "checkpoints"
        last = checkpoint.read_checkpoint(root / checkpoint.step_folder(step))
        best = best_folder(root)
        write_json(
            self.bundle.folder / "result.json",
            {
                "schema": SCHEMA,
                "run_id": self.bundle.run_id,
                "state": state,
                "exit_code": exit_code,
                "attempts": self.rank.attempt,
                "epoch": step / self.steps_per_epoch,
                "step": step,
                "world_size": self.rank.world.world_size,
                "virtual_ranks": last.manifest.get("virtual_ranks"),
                "metrics": metrics or last.manifest["metrics"],
                "seconds": self._seconds(seconds or self.clock.split()),
                "weights_sha256": last.manifest["weights_sha256"],
                "state_sha256": last.manifest["state_sha256"],
                "data_digest": self.data_digest,
                "config_hash": self.bundle.config_hash,
                "code_digest": self.bundle.code_digest,
                "last": str(last.folder),
                "best": str(best) if best else None,
            },
        )

    def _seconds(self, now: dict[str, float]) -> dict[str, float]:
        phases = {**self._earlier, **now}
        return {name: round(self._earlier.get(name, 0.0) + now.get(name, 0.0), 3) for name in phases}


def record_failure(bundle: Bundle, exit_code: int, rank: int | None, error: str) -> None:
    """Turn `result.json` of a run whose ranks could not write it themselves into a failed one."""
    known = _known_result(bundle)
    content = {**known, "state": "failed", "exit_code": exit_code, "rank": rank, "error": error}
    write_json(bundle.folder / "result.json", content)


def record_stop(bundle: Bundle, exit_code: int) -> None:
    """The same for a run that was stopped before its ranks had taken a step."""
    known = _known_result(bundle)
    if known["state"] != "done":
        write_json(bundle.folder / "result.json", {**known, "state": "stopped", "exit_code": exit_code})


def _known_result(bundle: Bundle) -> dict[str, Any]:
    path = bundle.folder / "result.json"
    facts = {"schema": SCHEMA, "run_id": bundle.run_id, "state": "new", "exit_code": None}
    return read_json(path) if path.exists() else {**facts, "epoch": 0, "step": 0, "metrics": {}, "seconds": {}}


def evaluation_record(evaluation: Evaluation, step: int | None, split: str, classes: Sequence[str]) -> dict[str, Any]:
    """`evaluation.json`: exact counts, per-class accuracy, the confusion matrix where it can still be read."""
    confusion = evaluation.confusion.tolist()
    return {
        "schema": SCHEMA,
        "step": step,
        "split": split,
        "classes": list(classes),
        "count": evaluation.count,
        "hits1": evaluation.hits1,
        "hits5": evaluation.hits5,
        "skipped": evaluation.skipped,
        "loss": evaluation.loss,
        "confusion": confusion if len(classes) <= CONFUSION_CLASSES else None,
        "confused_pairs": confused_pairs(evaluation, classes),
        "per_class": [
            {"name": name, "hits": row[number], "count": sum(row)}
            for number, (name, row) in enumerate(zip(classes, confusion, strict=True))
        ],
        "worst": [],
        "best": [],
    }


def confused_pairs(evaluation: Evaluation, classes: Sequence[str], limit: int = 20) -> list[dict[str, Any]]:
    """The most frequent mistakes, as (true class, predicted class, how often)."""
    wrong = evaluation.confusion.clone().fill_diagonal_(0).flatten()
    counts, places = wrong.topk(min(limit, len(wrong)))
    pairs = zip(counts.tolist(), places.tolist(), strict=True)
    n = len(classes)
    return [{"true": classes[at // n], "predicted": classes[at % n], "count": count} for count, at in pairs if count]


def write_evaluation(
    folder: Path, evaluation: Evaluation, step: int | None, index: ShardIndex, classes: Sequence[str], max_pixels: int
) -> dict[str, Any]:
    """Write `evaluation.json` of ``data.val`` with thumbnails of its worst and best samples; returns its content."""
    record = evaluation_record(evaluation, step, "val", classes)
    for kind in ("worst", "best"):
        record[kind] = save_samples(folder, kind, getattr(evaluation, kind), index, classes, max_pixels)
    write_json(folder / "evaluation.json", record)
    return record


def save_samples(
    folder: Path, name: str, outcomes: Sequence[Outcome], index: ShardIndex, classes: Sequence[str], max_pixels: int
) -> list[dict[str, Any]]:
    """Write thumbnails of samples to ``folder/samples`` and describe what the network made of each."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    reader, described = ShardReader(index), []
    for number, outcome in enumerate(outcomes):
        sample = reader.read(outcome.id)
        picture = Image.fromarray(decode_image(sample.image, max_pixels)[0])
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        path = folder / "samples" / f"{name}_{number:02}.png"
        picture.save(path)
        described.append(
            {
                "key": sample.key,
                "label": classes[outcome.label],
                "predicted": classes[outcome.predicted],
                "probability": outcome.probability,
                "loss": outcome.loss,
                "image": str(path.relative_to(folder)),
            }
        )
    reader.close()
    return described


def mirror_result(tracker: Tracker, folder: Path, record: dict[str, Any], result: dict[str, Any], upload: bool) -> None:
    """Send the end of a run to W&B: summary, confusion matrix, samples, checkpoints."""
    tracker.summary({"state": result["state"], **result["metrics"], "weights_sha256": result["weights_sha256"]})
    mirror_time(tracker, folder)
    if record["confusion"]:
        tracker.log_confusion(record["confusion"], record["classes"])
    for kind in ("worst", "best"):
        captions = [f"{s['label']} -> {s['predicted']} {s['probability']:.0%}" for s in record[kind]]
        tracker.log_images(f"samples/{kind}", [folder / s["image"] for s in record[kind]], captions)
    if upload:
        _mirror_checkpoints(tracker, result)


def mirror_time(tracker: Tracker, folder: Path) -> None:
    """Goodput and the split of the wall time so far, over all attempts."""
    tracker.summary(summary(measure_run(load_run(folder))))


def _mirror_checkpoints(tracker: Tracker, result: dict[str, Any]) -> None:
    folders = {result["last"]: ["last"]}
    if result["best"]:
        folders.setdefault(result["best"], []).append("best")
    for folder, aliases in folders.items():
        manifest = checkpoint.read_checkpoint(Path(folder)).manifest
        facts = {key: manifest[key] for key in ("run_id", "step", "metrics", "data_digest", "weights_sha256")}
        tracker.log_checkpoint(Path(folder), aliases, facts)
