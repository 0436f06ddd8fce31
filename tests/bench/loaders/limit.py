"""The practical limit: compiles limit.c on this machine's libjpeg-turbo and runs it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.loaders import BATCH, SIDE
from tests.bench.loaders.photos import tars

SOURCE = Path(__file__).parents[1] / "limit.c"
FLAGS = ("-std=gnu11", "-O3", "-march=native")


def build(folder: Path) -> Path:
    """The program, compiled where it is not yet. Raises RuntimeError where compiler or header are missing."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("no C compiler (apt-get install gcc)")
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()
    target = folder / f"limit-{digest[:12]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(target), "-ljpeg", "-lpthread", "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"limit.c does not compile (apt-get install libjpeg62-turbo-dev): {done.stderr[:300]}")
    return target


def measure(data: Path, workers: int, batches: int, warm_up: int, sheet: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "batch"
        command = [build(data), workers, batches, warm_up, raw if sheet else "-", *tars(data / "plain")]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        if sheet:
            _draw(raw, sheet)
    return json.loads(done.stdout)


def _draw(raw: Path, sheet: Path) -> None:
    import numpy as np

    from tests.bench.loaders import run

    run.sheet(iter([np.fromfile(raw, np.uint8).reshape(BATCH, SIDE, SIDE, 3)]), sheet)
