"""``python -m tests.bench.plain_stack``: one fault of each kind on the plain stack; prints a table and its figures.

Hung runs are ended after HUNG_S: gloo itself would wait for 30 minutes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
HUNG_S = 240
NUM_SAMPLES = 239
RANK, STEP, SAVED = 1, 17, 21
PLACES = {"disk full": (0, "save", SAVED), "loader hang": (RANK, "loader", 70), "loader SIGKILL": (RANK, "loader", 70)}
KINDS = (
    "exception", "sys.exit", "SIGTERM", "SIGINT", "SIGKILL", "SIGSEGV", "abort", "SIGSTOP", "GIL lock", "loader hang",
    "loader SIGKILL", "torn checkpoint", "disk full",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a run: exit codes of the command (None: ended by us), the end state, samples that were off."""

    codes: list[int | None]
    seconds: float
    sha256: str | None
    struck: bool
    left_out: int
    repeated: int


def run(shards: Path, folder: Path, strike: dict[str, Any] | None) -> Outcome:
    folder.mkdir()
    if strike:
        (folder / "strike.json").write_text(json.dumps(strike))
    began, codes = time.time(), [attempt(shards, folder)]
    if codes[0] not in (None, 0) or not (folder / "end.json").exists():
        codes.append(attempt(shards, folder))  # what a user would do next: the same command again
    end = folder / "end.json"
    sha256 = json.loads(end.read_text())["sha256"] if end.exists() else None
    left_out, repeated = off_samples(folder)
    return Outcome(codes, time.time() - began, sha256, (folder / "struck.json").exists(), left_out, repeated)


def attempt(shards: Path, folder: Path) -> int | None:
    script = str(Path(__file__).with_name("train.py"))
    torchrun = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--max-restarts", "3", "--standalone"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "faults"), "OMP_NUM_THREADS": "1"}
    with open(folder / "out.log", "a") as log:
        command = [*torchrun, script, str(shards), str(folder)]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        return process.wait(HUNG_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill_all_of(folder)
        process.wait()


def kill_all_of(folder: Path) -> None:
    """What is left of a command: torchrun's children have sessions of their own, but all are told the folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue


def off_samples(folder: Path) -> tuple[int, int]:
    """Of the steps that the end was computed from: samples that both epochs left out, and draws beyond two of one."""
    committed: dict[tuple[int, int], list[str]] = {}
    for path in sorted(folder.glob("samples_*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            committed[int(path.stem[-1]), entry["step"]] = entry["keys"]
    counts = Counter(key for keys in committed.values() for key in keys)
    return NUM_SAMPLES - len(counts), sum(max(0, count - 2) for count in counts.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shards = root / "shards"
        made = "shards make synthetic OUT --samples 299 --classes 4 --size 8 --samples-per-shard 30 --val-fraction 0.2"
        arguments = made.replace("OUT", str(shards)).split()
        subprocess.run([BIN / "orchestrator", *arguments], check=True, capture_output=True)
        alone = [run(shards, root / f"alone-{number}", None) for number in (1, 2)]
        print(f"undisturbed: {alone}", flush=True)
        print(
            "| fault | exit codes | finished | same bits | left out / repeated | seconds |\n|---|---|---|---|---|---|"
        )
        for number, kind in enumerate(sys.argv[1:] or KINDS):
            rank, phase, step = PLACES.get(kind, (RANK, "step", STEP))
            strike = {"fault": kind, "rank": rank, "phase": phase, "step": step}
            print(row(kind, run(shards, root / f"{number}-{kind}", strike), alone[0]), flush=True)


def row(kind: str, came: Outcome, alone: Outcome) -> str:
    codes = " → ".join("hung" if code is None else str(code) for code in came.codes)
    finished = "no" if came.sha256 is None else "yes"
    bits = "yes" if came.sha256 == alone.sha256 else "no"
    fired = "" if came.struck else " (did not fire)"
    samples = f"{came.left_out} / {came.repeated}"
    return f"| {kind}{fired} | {codes} | {finished} | {bits} | {samples} | {came.seconds:.0f} |"


if __name__ == "__main__":
    main()
