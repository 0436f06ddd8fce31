"""`orchestrator train ... --canary`: the table of checks that a run has passed before hours go into it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from orchestrator.cli.console import note, print_json, print_table

if TYPE_CHECKING:
    from orchestrator.bundle import Bundle
    from orchestrator.cluster.canary import Check


def run_canary(bundle: Bundle, as_json: bool) -> int:
    """Check one by one, then say what failed and why; the exit code is that of the cause."""
    from orchestrator.cluster.canary import examine, exit_code

    checks = []
    for check in examine(bundle):
        checks.append(check)
        if not sys.stdout.isatty() and not as_json:
            print(f"{check.state:<4}  {check.name}  {check.seconds:.1f} s: {check.found}", flush=True)
    if as_json:
        print_json([check.to_json() for check in checks])
    elif sys.stdout.isatty():
        print_table(("", "check", "s", "found"), [(c.state, c.name, c.seconds, c.found) for c in checks])
    _conclude(bundle, checks)
    return exit_code(checks)


def _conclude(bundle: Bundle, checks: list[Check]) -> None:
    failed = next((check for check in checks if check.state == "fail"), None)
    if failed:
        note(f"error: canary of {bundle.run_id}: {failed.name}: {failed.found}")
    else:
        seconds = sum(check.seconds for check in checks)
        note(f"canary of {bundle.run_id} passed in {seconds:.0f} s; the same command without --canary trains")
