"""How a rule of the schema refuses: by dotted key, with the bounds and the way out."""

from __future__ import annotations

from orchestrator.errors import ConfigError

INF = float("inf")


def require(ok: bool, key: str, value: object, rule: str, way_out: str) -> None:
    if not ok:
        raise ConfigError(key, value, rule, way_out)


def require_range(config: object, group: str, **bounds: tuple[float, float]) -> None:
    """Each named field lies within its closed bounds."""
    for field, (low, high) in bounds.items():
        value = getattr(config, field)
        if not low <= value <= high:
            span = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
            raise ConfigError(f"{group}.{field}", value, f"must be {span}", f"set {group}.{field} within the bounds")
