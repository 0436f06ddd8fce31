"""Runs that a new one may be taken for: of the same name, with a few other values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.bundle import Bundle
from orchestrator.config import MAY_CHANGE
from orchestrator.plain import to_dict

FEW = 5


def tell_earlier(bundle: Bundle) -> str | None:
    """Which earlier run this one is not, and why; nothing where it has begun already or none comes near.

    A run with another seed is one of its own, and so is one that names its beginning.
    """
    if (bundle.folder / "run.json").exists() or bundle.config.init_from is not None:
        return None
    own = identity(to_dict(bundle.config))
    found = [(differing(own, identity(config)), run_id) for run_id, config in _runs(bundle)]
    near = sorted((keys, run_id) for keys, run_id in found if 0 < len(keys) <= FEW and "seed" not in dict(keys))
    if not near:
        return None
    keys, run_id = min(near, key=lambda run: len(run[0]))
    changes = ", ".join(f"{key} = {here} (there {there})" for key, (here, there) in keys)
    return (
        f"{bundle.run_id} is a new run: {run_id} has another {changes}. The same values would continue that one; "
        f"init_from={run_id}:last starts from its weights"
    )


def _runs(bundle: Bundle) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in sorted(Path(bundle.config.runs_dir).glob(f"{bundle.config.name}-*/run.json")):
        try:
            content = json.loads(path.read_bytes())
            if content["config"]["name"] == bundle.config.name:
                yield str(content["run_id"]), content["config"]
        except (OSError, ValueError, KeyError, TypeError):
            continue


def identity(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values that make a run what it is, by dotted key."""
    found: dict[str, Any] = {}
    for name, value in plain.items():
        key = f"{prefix}{name}"
        if key in MAY_CHANGE:
            continue
        found |= identity(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return found


def differing(own: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[tuple[str, tuple[Any, Any]], ...]:
    """Keys with both values, in the order of keys."""
    keys = sorted({*own, *other})
    return tuple((key, (own.get(key), other.get(key))) for key in keys if own.get(key) != other.get(key))
