"""Runs the whole fault matrix and writes its table into docs/reliability.md, between two markers.

.venv/bin/python tests/faults/table.py [pytest arguments, e.g. -k SIGKILL]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "reliability.md"
sys.path[:0] = [str(HERE), str(HERE.parent)]

from cells import KINDS, PHASES, SENSELESS  # noqa: E402
from test_matrix import RESULTS  # noqa: E402


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", str(HERE / "test_matrix.py")]
        done = subprocess.run([*command, *sys.argv[1:]], env={**os.environ, RESULTS: folder}, check=False)
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    replace("fault matrix", render(results))
    return done.returncode


def render(results: list[dict[str, Any]]) -> str:
    """A row for each kind, a column for each phase; in a cell the word for rank 0 and for rank 1."""
    found = {(entry["kind"], entry["phase"], entry["rank"]): entry for entry in results}
    rows = [
        f"| fault | {' | '.join(PHASES)} | exit code | found after, s | next step after, s |",
        f"|---|{'---|' * (len(PHASES) + 3)}",
    ]
    for kind in KINDS:
        words = [_cell(found, kind, phase) for phase in PHASES]
        mine = [entry for entry in results if entry["kind"] == kind]
        codes = sorted({" → ".join(map(str, entry["codes"])) for entry in mine})
        times = [span_of(entry[name] for entry in mine if name in entry) for name in ("found_s", "again_s")]
        rows.append(f"| {kind} | {' | '.join(words)} | {', '.join(codes)} | {' | '.join(times)} |")
    return "\n".join([*rows, "", summary(results)])


def span_of(seconds: Iterable[float]) -> str:
    """Least, median and greatest."""
    ordered = sorted(seconds)
    return f"{ordered[0]:g} · {median(ordered):.2g} · {ordered[-1]:g}" if ordered else "–"


def _cell(found: dict[Any, dict[str, Any]], kind: str, phase: str) -> str:
    if (kind, phase) in SENSELESS:
        return "–"
    return ", ".join(verdict(found.get((kind, phase, rank))) for rank in (0, 1))


def verdict(entry: dict[str, Any] | None) -> str:
    """`equal`, or what was not as promised."""
    if entry is None:
        return "not run"
    faults = [] if entry["fired"] else ["did not fire"]
    faults += [] if entry["as_expected"] else ["other exit codes or attempts"]
    faults += entry["differences"][:1] + [f"{len(entry['leftovers'])} left over"] * bool(entry["leftovers"])
    return "; ".join(faults) or "equal"


def summary(results: list[dict[str, Any]]) -> str:
    equal = sum(verdict(entry) == "equal" for entry in results)
    left = sum(len(entry["leftovers"]) for entry in results)
    fired = sum(entry["fired"] for entry in results)
    return (
        f"{len(results)} cells: {fired} faults fired, {equal} runs ended with the bits, history and samples of the "
        f"undisturbed one, {left} things left behind."
    )


def replace(name: str, content: str) -> None:
    """Put `content` between the markers of that name."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    text, count = pattern.subn(lambda found: found[1] + content + "\n" + found[2], DOCS.read_text())
    assert count == 1, f"{DOCS} has no place for the {name}"
    DOCS.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
