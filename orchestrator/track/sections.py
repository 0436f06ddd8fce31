"""What stands in each part of the report, worked out from the record of the run; nothing here reads a file or draws."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.redact import without_secrets
from orchestrator.track.runs import Event, RunRecord, history, value
from orchestrator.track.timeline import read_timeline
from orchestrator.track.words import duration, exit_meaning, first_line, moment, percent, plain, share

READING = {
    "data/shards_fetched": "shards fetched",
    "data/gib_fetched": "GiB",
    "data/retries": "retries",
    "data/shards_quarantined": "shards damaged",
    "data/samples_lost": "samples lost",
}
PAIRS_SHOWN = 20
CLASSES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Score:
    """An exact accuracy: `hits` of `count`."""

    hits: int
    count: int

    @property
    def percent(self) -> str:
        return percent(share(self.hits, self.count))

    @property
    def fraction(self) -> str:
        return f"{self.hits:,} of {self.count:,}"


def score(run: RunRecord, top: int) -> Score | None:
    """The latest validation accuracy that is known exactly: result, evaluation, or the last evaluation event."""
    found = [(run.result.get("metrics") or {}).get(f"val/acc{top}")]
    evaluation = run.evaluation or {}
    found.append({"hits": evaluation.get(f"hits{top}"), "count": evaluation.get("count")})
    found += [e.get(f"val/acc{top}") for e in reversed(run.events) if e["kind"] == "eval"][:1]
    for metric in found:
        if isinstance(metric, Mapping) and isinstance(metric.get("hits"), int) and metric.get("count"):
            return Score(metric["hits"], metric["count"])
    return None


def best_epoch(events: Iterable[Event]) -> tuple[str, str] | None:
    """Highest validation top-1 of the run and the epoch it was reached in, when there were several evaluations."""
    points = [(value(e.get("val/acc1")), e.get("epoch", 0)) for e in events if e["kind"] == "eval"]
    known = [(accuracy, epoch) for accuracy, epoch in points if accuracy is not None]
    if len(known) < 2:
        return None
    accuracy, epoch = max(known, key=lambda point: point[0])
    return percent(accuracy), f"{epoch:g}"


def wall_seconds(run: RunRecord) -> float | None:
    """Seconds from the first to the last event; where there is none, as accounted for."""
    timeline = read_timeline(run.ranks, run.launcher)
    if timeline.ended > timeline.began:
        return timeline.ended - timeline.began
    seconds = run.result.get("seconds") or {}
    return sum(seconds.values()) if seconds else None


def headline(run: RunRecord) -> str:
    """One sentence: what became of the run."""
    step, epoch = run.result.get("step"), run.result.get("epoch")
    if step is None and run.events:
        last = next((e for e in reversed(run.events) if "step" in e), {})
        step, epoch = last.get("step"), last.get("epoch")
    done = f"{step:,} steps" if isinstance(step, int) and step else "no step yet"
    if isinstance(epoch, int | float) and epoch:
        done += f", {epoch:.3g} epochs"
    wall = wall_seconds(run)
    return f"{done}{f', in {duration(wall)}' if wall else ''}"


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """The small figures of the header."""
    metrics = run.result.get("metrics") or {}
    loss, wall = value(metrics.get("val/loss")), wall_seconds(run)
    speeds = sorted(e["train/images_per_s"] for e in run.events if e.get("train/images_per_s"))
    best = best_epoch(history(run.events))
    world_size = run.result.get("world_size") or next((e["world_size"] for e in run.events if "world_size" in e), None)
    rows = [
        ("Validation loss", f"{loss:.4f}" if loss is not None else None),
        (f"Best top-1, epoch {best[1]}" if best else "", best[0] if best else None),
        ("Wall time", duration(wall) if wall else None),
        ("Processes", world_size),
        ("Attempts", max(run.result.get("attempts") or 0, len(attempts(run))) or None),
        ("Throughput", f"{speeds[len(speeds) // 2]:,.0f} images/s" if speeds else None),
        ("Steps left out, not finite", max((e.get("train/skipped_steps", 0) for e in run.events), default=0) or None),
    ]
    return [(name, str(text)) for name, text in rows if text is not None]


COMMAND_TITLE = {"done": "Made by", "starting": "Started by", "running": "Started by"}
"""What the command that made a run is good for, by its state; in any other state it goes on where the run stopped."""


def commands(run: RunRecord) -> list[tuple[str, str]]:
    """What to type next, for a person in the folder where the run was started."""
    evaluated = run.result.get("checkpoint")
    best, last = run.result.get("best"), run.result.get("last")
    found = []
    if "overrides" in run.bundle and not evaluated:
        again = shlex.join(["orchestrator", "train", *map(str, run.bundle["overrides"])])
        found.append((COMMAND_TITLE.get(run.state, "Go on where it stopped"), again))
    if checkpoint := evaluated or best or last:
        place = shlex.quote(f"checkpoint={checkpoint}")
        which = "checkpoint again" if evaluated else "best checkpoint" if best else "last checkpoint"
        found.append((f"Evaluate the {which}", f"orchestrator evaluate {place}"))
        found.append(("Classify your own images", f"orchestrator predict {place} IMAGE"))
    return found


def failure(run: RunRecord) -> dict[str, str] | None:
    """The error of a failed run, with what its exit code means."""
    code = run.result.get("exit_code")
    error = run.result.get("error")
    if run.state != "failed" and not error:
        return None
    rank = run.result.get("rank")
    return {
        "error": str(error or "no error was recorded; logs/ holds what each rank wrote"),
        "where": f"rank {rank}" if rank is not None else "",
        "code": "" if code is None else f"exit code {code}",
        "meaning": exit_meaning(code),
    }


def reading(run: RunRecord) -> list[dict[str, str]]:
    """What reading each epoch took, where anything was fetched, tried again or lost."""
    found = [event for event in history(run.events) if event["kind"] == "data"]
    if not any(value(event.get(key)) for event in found for key in READING):
        return []
    return [
        {"epoch": f"{event.get('epoch', 0):g}", **{name: _count(event, key) for key, name in READING.items()}}
        for event in found
    ]


def _count(event: Event, key: str) -> str:
    number = value(event.get(key)) or 0
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.3f}"


def attempts(run: RunRecord) -> list[dict[str, str]]:
    """One row per attempt: when, from where to where, and how it ended."""
    groups: dict[object, list[Event]] = {}
    for event in run.events:
        groups.setdefault(event.get("attempt", 1), []).append(event)
    faults = {event["attempt"]: event for event in run.launcher if event["kind"] == "fault"}
    rows = [_attempt(str(number), group, faults.get(number, {})) for number, group in groups.items()]
    if rows and not rows[-1]["ended"] and run.state == "running":
        rows[-1]["ended"] = "going on"
    return [{**row, "ended": row["ended"] or "killed or crashed"} for row in rows]


def _attempt(number: str, group: list[Event], fault: Event) -> dict[str, str]:
    steps = [event["step"] for event in group if "step" in event]
    times = [event["t"] for event in group if "t" in event]
    ending = next((e for e in reversed(group) if e["kind"] in {"end", "stop"}), {})
    ended = exit_meaning(ending.get("exit_code")) or ("stopped on request" if ending.get("kind") == "stop" else "")
    if fault:
        rank = f"rank {fault['rank']}: " if fault.get("rank") is not None else ""
        ended = rank + first_line(fault.get("error"))
    return {
        "number": number,
        "processes": str(next((e["world_size"] for e in group if "world_size" in e), "–")),
        "started": moment(times[0] if times else None),
        "steps": f"{min(steps):,} → {max(steps):,}" if steps else "–",
        "lasted": duration(times[-1] - times[0]) if times else "–",
        "ended": f"stopped: {ending['reason']}" if "reason" in ending else ended,
    }


def config_rows(run: RunRecord) -> dict[str, list[tuple[str, str, str]]]:
    """(key, value, source) by origin: `chosen` by hand, experiment or recipe, `preset` of a group, or `default`."""
    rows: dict[str, list[tuple[str, str, str]]] = {"chosen": [], "preset": [], "default": []}
    for key, item in _leaves(without_secrets(run.config)):
        source = run.sources.get(key, "")
        rows[_origin(source)].append((key, plain(item), source.removeprefix("conf/")))
    rows["chosen"].sort(key=lambda row: row[2] != "override")
    return rows


def _origin(source: str) -> str:
    if source == "override" or ("defaults.yaml" not in source and ("experiment/" in source or "recipe/" in source)):
        return "chosen"
    return "default" if not source or source.endswith(("/defaults.yaml", "config.yaml")) else "preset"


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in node.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item


def confused_pairs(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pairs of classes that are taken for each other most often."""
    pairs = evaluation.get("confused_pairs")
    if not pairs:
        names, matrix = evaluation.get("classes") or [], evaluation.get("confusion") or []
        pairs = [
            {"true": names[i], "predicted": names[j], "count": count}
            for i, row in enumerate(matrix)
            for j, count in enumerate(row)
            if i != j and count
        ]
    return sorted(pairs, key=lambda pair: -pair["count"])[:PAIRS_SHOWN]


def class_bars(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Per-class accuracy, worst first; of many classes only the worst, with a word on the rest."""
    bars = [
        {"name": c["name"], "fraction": f"{c['hits']}/{c['count']}", "share": share(c["hits"], c["count"])}
        for c in evaluation.get("per_class") or []
        if c.get("count")
    ]
    bars.sort(key=lambda bar: bar["share"])
    for bar in bars:
        bar["percent"], bar["width"] = percent(bar["share"], 1), round(100 * bar["share"], 2)
    rest = bars[CLASSES_SHOWN:]
    return {"bars": bars[:CLASSES_SHOWN], "rest": len(rest), "rest_from": rest[0]["percent"] if rest else ""}


def environment(run: RunRecord) -> dict[str, list[tuple[str, str]]]:
    """Versions, code, machine and data, each as (name, text)."""
    bundle, git = run.bundle, run.bundle.get("git") or {}
    commit = str(git.get("commit") or "")
    code = [
        ("git commit", f"{commit[:12]}{' with uncommitted changes' if git.get('dirty') else ''}" if commit else ""),
        ("git branch", git.get("branch")),
        ("code digest", bundle.get("code_digest")),
        ("lock digest", bundle.get("lock_digest")),
        ("config hash", bundle.get("config_hash")),
        ("weights sha256", run.result.get("weights_sha256")),
    ]
    groups: dict[str, Iterable[tuple[str, object]]] = {
        "Code": code,
        "Data": [row for split, known in run.data.items() for row in _data_rows(split, without_secrets(known))],
        "Machine": (bundle.get("machine") or {}).items(),
        "Packages": (bundle.get("versions") or {}).items(),
    }
    filled = {title: [(str(k), plain(v)) for k, v in rows if v not in (None, "")] for title, rows in groups.items()}
    return {title: rows for title, rows in filled.items() if rows}


def _data_rows(split: str, known: Mapping[str, Any]) -> list[tuple[str, object]]:
    size = f"{known.get('num_samples', 0):,} images, {known.get('num_classes', '?')} classes"
    return [(split, size), (f"{split} shards", known.get("location")), (f"{split} digest", known.get("digest"))]
