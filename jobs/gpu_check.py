"""Check one GPU in ten minutes, every result with its figures.

python -m jobs.gpu_check                                # the same as `make gpu-check`
python -m jobs.gpu_check --json h100.json --minutes 5
python -m jobs.gpu_check --only step_time/bf16
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator import gpu_check
from orchestrator.cli.console import note, print_table, progress
from orchestrator.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_NODE, EXIT_USER
from orchestrator.files import write_json
from orchestrator.gpu_check import CHECKS, NO_GPU, Check, CheckResult, Setting
from orchestrator.probes import try_write

OUT = Path("bench/out/gpu_check.json")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m jobs.gpu_check", description=__doc__, formatter_class=text)
    parser.add_argument("--json", type=Path, default=OUT, metavar="OUT", help=f"file for the figures, default {OUT}")
    parser.add_argument("--minutes", type=float, default=10.0, help="what does not start in time fails, default 10")
    parser.add_argument("--only", default="", metavar="PREFIX", help="only the checks whose name starts with this")
    args = parser.parse_args(argv)
    args.checks = [check for check in CHECKS if check.name.startswith(args.only)]
    if not args.checks:
        parser.exit(
            EXIT_USER, f"--only {args.only} names no check. Way out: one of {', '.join(c.name for c in CHECKS)}\n"
        )
    if not args.minutes > 0:
        parser.exit(EXIT_USER, f"--minutes {args.minutes} must be above 0. Way out: --minutes 10\n")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        require_writable(args.json)
    except OSError as error:
        note(f"--json {args.json}: {error.strerror}. Way out: --json PATH that this user may write to")
        return EXIT_USER
    found = gpu_check.find_gpu()
    if found is None:
        write_json(args.json, NO_GPU)
        print("No GPU on this machine: nothing was checked.")
        return EXIT_DONE
    if found != "usable":
        note(f"{found}. Way out: a torch build for this driver, or a newer driver (see `orchestrator doctor`)")
        return EXIT_NODE
    return run(args.checks, Setting(), args.minutes, args.json)


def require_writable(out: Path) -> None:
    """Before the checks, so that ten minutes of figures do not end at a folder that refuses them. Raises OSError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    try_write(out.parent)


def run(checks: Sequence[Check], setting: Setting, minutes: float, out: Path) -> int:
    """Run, print and write; what is there at Ctrl-C is printed and written too."""
    results: list[CheckResult] = []
    interrupted = False
    try:
        with progress("gpu-check", len(checks), "checks") as advance:
            for result in gpu_check.run_all(checks, setting, minutes):
                results.append(result)
                advance(1)
    except KeyboardInterrupt:
        interrupted = True
    write_json(out, gpu_check.to_report(results))
    print_results(results, out)
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_DONE if all(result.ok for result in results) else EXIT_NODE


def print_results(results: Sequence[CheckResult], out: Path) -> None:
    rows = [(r.name, "ok" if r.ok else "failed", r.seconds, r.error or describe(r.figures)) for r in results]
    print_table(("check", "state", "seconds", "figures"), rows)
    for result in results:
        if not result.ok and result.figures:
            print(f"{result.name}: {describe(result.figures)}")
    print(f"{sum(r.ok for r in results)} of {len(results)} ok; figures in {out}")


def describe(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in figures.items() if value is not None)


if __name__ == "__main__":
    sys.exit(main())
