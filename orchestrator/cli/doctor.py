"""`orchestrator doctor`: the report of this machine's fitness, as a table, plain lines or JSON."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from orchestrator.cli.console import print_json, progress

if TYPE_CHECKING:
    from orchestrator.verdicts import Finding

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
EPILOG = """examples:
  orchestrator doctor --runs-dir /mnt/runs --processes 2
  orchestrator doctor --json | jq '.[] | select(.state != "ok")'

exit code: 0 if nothing fails, 42 if something is yours to mend, 44 if only the node is unfit
"""


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine: packages, devices, memory, disk, network, W&B",
        description="Check this machine for everything a run needs, and say the way out of what is amiss.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print a list of {name, state, found, way_out}")
    parser.add_argument("--runs-dir", default="runs", help="folder or object store for runs (default: %(default)s)")
    parser.add_argument("--processes", type=_count, help="processes meant for this machine (default: its GPUs, else 1)")
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    from orchestrator.verdicts import exit_code

    findings = _examine(args)
    if args.json:
        print_json([finding.to_json() for finding in findings])
    elif sys.stdout.isatty():
        _print_table(findings)
    else:
        _print_lines(findings)
    return exit_code(findings)


def _examine(args: argparse.Namespace) -> list[Finding]:
    from orchestrator.doctor import CHECKS, examine, start_visit

    findings = []
    quiet = nullcontext(lambda n: None)
    with progress("doctor", len(CHECKS), "checks") if sys.stderr.isatty() else quiet as advance:
        for finding in examine(start_visit(args.runs_dir, args.processes)):
            findings.append(finding)
            advance(1)
    return findings


def summarize(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.state.value for finding in findings)
    return ", ".join(f"{counts[state]} {state}" for state in COLOURS)


def _print_table(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        found = Text(finding.found)
        if finding.way_out:
            found.append(f"\n→ {finding.way_out}", style="cyan")
        table.add_row(Text(finding.state, style=COLOURS[finding.state]), Text(finding.name), found)
    console = Console()
    console.print(table)
    console.print(f"\n{summarize(findings)}", highlight=False)


def _print_lines(findings: Sequence[Finding]) -> None:
    for finding in findings:
        way_out = f". Way out: {finding.way_out}" if finding.way_out else ""
        print(f"{finding.state:<4}  {finding.name}: {finding.found}{way_out}")
    print(summarize(findings))
