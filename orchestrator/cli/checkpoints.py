"""Verbs on checkpoints: evaluate, predict."""
from typing import Any


def add_to(subparsers: Any) -> None: ...
