"""What tests of several rooms share."""

from __future__ import annotations

import os

# Before torch is loaded: tests fork, and a child that inherits OpenMP's threads waits for ever for those it lacks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from launching import cli, saboteur, saboteur_package, session_cli, shards, small, trained, warm_server  # noqa: F401


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and weights that lies beside the repository or at $ORCHESTRATOR_TEST_DATA."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ORCHESTRATOR_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no test data: neither ../shared/data nor $ORCHESTRATOR_TEST_DATA ({folder}) is a folder")
    return folder
