"""What the workers of a run need before they meet: one folder, one code, the time to start."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path

from orchestrator.bundle import Bundle, imported_code
from orchestrator.errors import ConfigError, UserError
from orchestrator.files import read_json, write_json

SCHEMA = 1
SUBMISSION_VARIABLE = "ORCHESTRATOR_SUBMISSION"
"""Of the driver: the id of its job."""
SEEN_S = 10.0
"""How long another node's write may take to be seen here."""


def driver_file(folder: Path) -> Path:
    """Written by the driver of the run's newest job."""
    return folder / "ray.json"


def write_driver(folder: Path, submission_id: str | None, token: str) -> None:
    write_json(driver_file(folder), {"schema": SCHEMA, "submission_id": submission_id, "token": token})


def require_one_folder(bundle: Bundle, token: str, timeout_s: float = SEEN_S) -> None:
    """Raises ConfigError where this node does not see what the driver wrote into the run's folder."""
    until = time.monotonic() + timeout_s
    while True:
        with suppress(OSError, ValueError, KeyError):
            if read_json(driver_file(bundle.folder))["token"] == token:
                return
        if time.monotonic() > until:
            rule = f"is not the same folder on all nodes: {socket.gethostname()} does not see what the driver wrote"
            way_out = "runs_dir=/PATH on a file system that all nodes share, mounted at one place"
            raise ConfigError("runs_dir", bundle.config.runs_dir, rule, way_out)
        time.sleep(0.1)


def require_same_code(bundle: Bundle) -> None:
    """Raises UserError where this node imported other code than the run was submitted with."""
    here = imported_code()
    if here != bundle.code_digest:
        raise UserError(
            f"{socket.gethostname()} imported other code ({here[:12]}) than the run was submitted with "
            f"({bundle.code_digest[:12]}). Way out: cluster.code=archive, or install the same version there"
        )


def stopping_file(folder: Path) -> Path:
    """There while the driver waits for its end: no other attempt begins."""
    return folder / "stopping"


def restart_file(folder: Path) -> Path:
    return folder / "restart.json"


def put_off(folder: Path, pause_s: float) -> None:
    """The next attempt begins after a pause."""
    write_json(restart_file(folder), {"schema": SCHEMA, "not_before": time.time() + pause_s, "pause_s": pause_s})


def wait_until_due(folder: Path) -> float | None:
    """Wait for the pause before this attempt and return its length; None for the first attempt of a job."""
    if not restart_file(folder).exists():
        return None
    order = read_json(restart_file(folder))
    left = min(order["not_before"] - time.time(), order["pause_s"])  # the clocks of two nodes may differ
    time.sleep(max(0.0, left))
    restart_file(folder).unlink(missing_ok=True)
    return order["pause_s"]
