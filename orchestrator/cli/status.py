"""Verbs that look at runs: ls, status. On this machine they read files only, so a run does not notice them."""

from __future__ import annotations

import argparse
from typing import Any

from orchestrator.cli.backends import add_id, add_verb, choose_backend, open_run
from orchestrator.cli.console import print_json, print_table
from orchestrator.errors import EXIT_DONE

STATUS = """examples:
  orchestrator status
  orchestrator status quickstart-0123abcd cluster=kubernetes --json

Without an ID it is the run that was touched last. Works for a run that is running, has ended or was killed."""
LS = """examples:
  orchestrator ls
  orchestrator ls --runs-dir /mnt/runs --json
  orchestrator ls cluster=kubernetes cluster.namespace=training"""
ABOUT = {"running": "running as process {launcher}", "dead": "not running: the lock is free, and no end was recorded"}

KNOWN_HERE = (
    "launcher", "exit_code", "reason", "error", "where", "attempt", "world_size", "step", "total_steps", "epoch",
    "eta_s", "images_per_s", "goodput", "wall_s", "process_hours", "cost", "wasted_steps", "wasted_samples",
    "stragglers", "last_fault", "faults", "checkpoint", "folder", "wandb", "next", "ranks",
)  # fmt: skip
"""Facts that another cluster may not know."""


def add_to(subparsers: Any) -> None:
    text = "where a run stands: step, time left, goodput, cost, faults"
    add_id(add_verb(subparsers, "status", text, STATUS, status), "?")
    add_verb(subparsers, "ls", "the runs of a folder or a cluster", LS, list_runs)


def status(args: argparse.Namespace) -> int:
    backend, run_id = open_run(args)
    facts = backend.status(run_id)
    if args.json:
        print_json(facts)
    else:
        print("\n".join(f"{name:<14} {text}" for name, text in told(facts)))
    return EXIT_DONE


def list_runs(args: argparse.Namespace) -> int:
    found = choose_backend(args).runs()
    if args.json:
        print_json(found)
        return EXIT_DONE
    rows = [tuple(_cells(facts)) for facts in found]
    print_table(("run", "state", "step", "top-1", "goodput", "wall time", "attempts"), rows)
    return EXIT_DONE


def _cells(facts: dict[str, Any]) -> list[Any]:
    from orchestrator.track.words import duration

    known = {name: facts.get(name) for name in ("top1", "goodput", "wall_s", "attempt")}
    return [
        facts["run_id"],
        facts["state"],
        _steps(facts),
        "–" if known["top1"] is None else f"{known['top1']:.2%}",
        "–" if known["goodput"] is None else f"{known['goodput']:.0%}",
        "–" if known["wall_s"] is None else duration(known["wall_s"]),
        "–" if known["attempt"] is None else known["attempt"],
    ]


def told(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) as a person reads them; what is not known is left out."""
    from orchestrator.track.words import duration, exit_meaning

    facts = {**dict.fromkeys(KNOWN_HERE), **facts}
    about = ABOUT.get(facts["state"]) if facts["launcher"] or facts["state"] == "dead" else None
    about = (about or facts["state"]).format(launcher=facts["launcher"])
    code, fault, saved = facts["exit_code"], facts["last_fault"], facts["checkpoint"]
    rows = [
        ("run", facts["run_id"]),
        ("state", f"{about} ({exit_meaning(code)})" if code else about),
        ("because", facts["reason"] or facts["error"] or ""),
        ("where", "" if facts["launcher"] else ", ".join(facts["where"] or [])),
        ("attempt", f"{facts['attempt']}" + (f", {facts['world_size']} processes" if facts["world_size"] else "")
         if facts["attempt"] else ""),
        ("step", _steps(facts) + (f", epoch {facts['epoch']:.2f}" if facts["epoch"] else "")),
        ("time left", duration(facts["eta_s"]) if facts["eta_s"] is not None else ""),
        ("speed", f"{facts['images_per_s']:,.0f} images/s" if facts["images_per_s"] else ""),
        ("goodput", f"{facts['goodput']:.1%} of {duration(facts['wall_s'])}"
         if facts["wall_s"] and facts["goodput"] is not None else ""),
        ("cost so far", _cost(facts)),
        ("lost work", f"{facts['wasted_steps']} steps, {facts['wasted_samples']} samples computed again"
         if facts["wasted_steps"] else ""),
        ("stragglers", "; ".join(facts["stragglers"] or [])),
        ("last fault", _fault(fault) + f" ({facts['faults']} in all)" if fault else ""),
        ("checkpoint", f"step {saved['step']}, {duration(saved['age_s'])} old, {facts['folder']}/{saved['path']}"
         if saved else ""),
        ("W&B", facts["wandb"] or ""),
        ("next", facts["next"] or ""),
    ]  # fmt: skip
    silent = [f"rank {r}: {s['phase']}, silent for {duration(s['silent_s'])}" for r, s in (facts["ranks"] or {}).items()
              if s["silent_s"] > 10]  # fmt: skip
    return [(name, text) for name, text in [*rows, ("silent", "; ".join(silent))] if text]


def _steps(facts: dict[str, Any]) -> str:
    step, total = facts.get("step"), facts.get("total_steps")
    return "–" if step is None else f"{step} of {total}" if total else str(step)


def _cost(facts: dict[str, Any]) -> str:
    if facts["process_hours"] is None:
        return ""
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
