"""Verbs that look at runs: ls, status. They read files only, so a run does not notice them."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from orchestrator.cli.console import print_json, print_table
from orchestrator.errors import EXIT_DONE, UserError, nearest

STATUS = """examples:
  orchestrator status
  orchestrator status quickstart-0123abcd --json

Without an ID it is the run that was touched last. Works for a run that is running, has ended or was killed."""
LS = """examples:
  orchestrator ls
  orchestrator ls --runs-dir /mnt/runs --json"""
ABOUT = {"running": "running as process {launcher}", "dead": "not running: the lock is free, and no end was recorded"}


def add_to(subparsers: Any) -> None:
    for name, text, epilog, run in (
        ("status", "where a run stands: step, time left, goodput, cost, faults", STATUS, status),
        ("ls", "the runs of a folder", LS, list_runs),
    ):
        raw = argparse.RawDescriptionHelpFormatter
        parser = subparsers.add_parser(name, help=text, epilog=epilog, formatter_class=raw)
        if name == "status":
            parser.add_argument("run_id", nargs="?", metavar="ID", help="of the run; the last one where left out")
        parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="folder of runs (default: %(default)s)")
        parser.add_argument("--json", action="store_true", help="print the facts as JSON")
        parser.set_defaults(run=run)


def status(args: argparse.Namespace) -> int:
    facts = facts_of(find_run(args.run_id, args.runs_dir))
    if args.json:
        print_json(facts)
    else:
        print("\n".join(f"{name:<14} {text}" for name, text in told(facts)))
    return EXIT_DONE


def list_runs(args: argparse.Namespace) -> int:
    found = [facts_of(folder) for folder in run_folders(args.runs_dir)]
    if args.json:
        print_json(found)
        return EXIT_DONE
    from orchestrator.track.words import duration

    rows = [
        (f["run_id"], f["state"], _steps(f), "–" if f["top1"] is None else f"{f['top1']:.2%}",
         f"{f['goodput']:.0%}", duration(f["wall_s"]), f["attempt"])
        for f in found
    ]  # fmt: skip
    print_table(("run", "state", "step", "top-1", "goodput", "wall time", "attempts"), rows)
    return EXIT_DONE


def run_folders(runs_dir: Path) -> list[Path]:
    """Folders of runs, the one that was touched last at the end."""
    return sorted((path.parent for path in runs_dir.glob("*/run.json")), key=_touched)


def _touched(folder: Path) -> float:
    times = [path.stat().st_mtime for path in (folder / "run.json", *folder.glob("events/*.jsonl")) if path.exists()]
    return max(times, default=0.0)


def find_run(run_id: str | None, runs_dir: Path) -> Path:
    """The folder of a run, by its id or as a path. Raises UserError with the nearest match."""
    folders = run_folders(runs_dir)
    if run_id is None:
        if not folders:
            raise UserError(f"--runs-dir {runs_dir}: no run there. Way out: orchestrator train experiment=quickstart")
        return folders[-1]
    for folder in (runs_dir / run_id, Path(run_id)):
        if (folder / "run.json").exists():
            return folder
    hint = nearest(run_id, [folder.name for folder in folders]) if folders else "there is none at all"
    raise UserError(f"ID {run_id} is no run in {runs_dir}/: {hint} Way out: orchestrator ls")


def facts_of(folder: Path) -> dict[str, Any]:
    """The record's facts, and what only a living rank shows: its phase, step and silence."""
    from orchestrator.cluster.lock import holder
    from orchestrator.track.runs import load_run
    from orchestrator.track.status import status_of

    launcher = holder(folder)
    facts = status_of(load_run(folder), launcher, time.time())
    ranks = living_ranks(folder, facts["attempt"]) if launcher else {}
    step = min((rank["step"] for rank in ranks.values()), default=0)  # newer than the last logged one
    return {**facts, "step": max(step, facts["step"]), "ranks": ranks}


def living_ranks(folder: Path, attempt: int) -> dict[int, dict[str, Any]]:
    """By rank, the phase and step of its newest sign of life and the seconds since then."""
    from orchestrator.train.heartbeat import read_sign

    found = {}
    for path in sorted(folder.glob(f"logs/attempt_{attempt}/rank_*.heartbeat")):
        sign = read_sign(path)
        if sign is not None:
            silent = round(time.monotonic() - sign.t, 1)
            found[int(path.stem.removeprefix("rank_"))] = {"phase": sign.phase, "step": sign.step, "silent_s": silent}
    return found


def told(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) as a person reads them; what is not known is left out."""
    from orchestrator.track.words import duration, exit_meaning

    about = ABOUT.get(facts["state"], str(facts["state"])).format(launcher=facts["launcher"])
    code, fault, saved = facts["exit_code"], facts["last_fault"], facts["checkpoint"]
    rows = [
        ("run", facts["run_id"]),
        ("state", f"{about} ({exit_meaning(code)})" if code else about),
        ("attempt", f"{facts['attempt']}, {facts['world_size']} processes" if facts["attempt"] else ""),
        ("step", _steps(facts) + (f", epoch {facts['epoch']:.2f}" if facts["epoch"] else "")),
        ("time left", duration(facts["eta_s"]) if facts["eta_s"] is not None else ""),
        ("speed", f"{facts['images_per_s']:,.0f} images/s" if facts["images_per_s"] else ""),
        ("goodput", f"{facts['goodput']:.1%} of {duration(facts['wall_s'])}" if facts["wall_s"] else ""),
        ("cost so far", _cost(facts)),
        ("lost work", f"{facts['wasted_steps']} steps, {facts['wasted_samples']} samples computed again"
         if facts["wasted_steps"] else ""),
        ("stragglers", "; ".join(facts["stragglers"])),
        ("last fault", _fault(fault) + f" ({facts['faults']} in all)" if fault else ""),
        ("checkpoint", f"step {saved['step']}, {duration(saved['age_s'])} old, {facts['folder']}/{saved['path']}"
         if saved else ""),
        ("W&B", facts["wandb"] or ""),
        ("next", facts["next"] or ""),
    ]  # fmt: skip
    silent = [f"rank {r}: {s['phase']}, silent for {duration(s['silent_s'])}" for r, s in facts["ranks"].items()
              if s["silent_s"] > 10]  # fmt: skip
    return [(name, text) for name, text in [*rows, ("silent", "; ".join(silent))] if text]


def _steps(facts: dict[str, Any]) -> str:
    return f"{facts['step']} of {facts['total_steps']}" if facts["total_steps"] else str(facts["step"])


def _cost(facts: dict[str, Any]) -> str:
    hours = f"{facts['process_hours']:.3g} process-hours"
    if facts["cost"] is None:
        return f"{hours} (no price: cluster.prices=['DEVICE=PRICE'])" if facts["attempt"] else ""
    return f"{hours}, {facts['cost']:.4g} {facts['currency']}"


def _fault(fault: dict[str, Any]) -> str:
    from orchestrator.track.words import first_line

    where = f"rank {fault['rank']}: " if fault["rank"] is not None else ""
    place = f", phase {fault['phase']}, step {fault['step']}" if fault["phase"] else ""
    again = f", {fault['recovery_s']:.1f} s to the next first step" if fault["recovery_s"] is not None else ""
    return f"{where}{first_line(fault['error'])}{place}{again}"
