"""What the cluster tells the launcher of a node in environment variables, and where that one leaves its last words."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError

TERMINATION_LOG = "/dev/termination-log"
ASK_FILE = "/etc/orchestrator/ask/ask"
LONGEST_ERROR = 2500
"""Bytes; Kubernetes keeps 4096 of the whole message."""
NUMBERS = ("NODE_RANK", "NUM_NODES", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Node:
    """Which node of a run this is."""

    rank: int
    count: int
    address: str
    """Name or address of node 0."""
    port: int
    termination_log: Path
    ask_file: Path


def read_node(env: Mapping[str, str] = os.environ) -> Node:
    """The node that the cluster describes. Raises UserError for what is missing or wrong."""
    wrong = [f"{name}={env.get(name, '(missing)')}" for name in NUMBERS if not env.get(name, "").isdecimal()]
    wrong += [] if env.get("MASTER_ADDR") else ["MASTER_ADDR=(missing)"]
    if wrong:
        raise _refusal(f"{', '.join(wrong)}, and each must be set, the numbers from 0 up")
    rank, count, port = (int(env[name]) for name in NUMBERS)
    if rank >= count:
        raise _refusal(f"NODE_RANK={rank} of NUM_NODES={count}")
    termination_log = Path(env.get("TERMINATION_LOG") or TERMINATION_LOG)
    return Node(rank, count, env["MASTER_ADDR"], port, termination_log, Path(env.get("ASK_FILE") or ASK_FILE))


def _refusal(what: str) -> UserError:
    return UserError(
        f"the environment of this node says {what}. Way out: let the cluster start it, or set NODE_RANK, NUM_NODES, "
        "MASTER_ADDR and MASTER_PORT by hand"
    )


def leave_last_words(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the termination message, where the cluster reads one."""
    error = facts["error"]
    if error is not None:
        error = error.encode()[:LONGEST_ERROR].decode(errors="ignore")
    content = json.dumps({"schema": 1, **facts, "error": error}, ensure_ascii=False)
    with suppress(OSError):
        path.write_text(content)
