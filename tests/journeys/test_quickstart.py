"""The quick start as `make quickstart` runs it, whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quick_start_reads_more_than_nineteen_of_twenty_digits(tmp_path: Path) -> None:
    for command in (("shards", "make", "digits", "data/digits"), ("train", "experiment=quickstart", "--json")):
        done = subprocess.run(
            [BIN / "orchestrator", *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["metrics"]["val/acc1"]["count"] == 359
    assert result["metrics"]["val/acc1"]["value"] > 0.95
    assert (tmp_path / "runs" / result["run_id"] / "report.html").stat().st_size < 1_000_000
