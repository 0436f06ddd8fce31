"""Between the config dataclasses and plain JSON values, strict in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from math import isfinite
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError, nearest


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON values of a config dataclass; enums by name."""
    plain = {}
    for field in fields(config):
        value = getattr(config, field.name)
        plain[field.name] = [_plain(item) for item in value] if isinstance(value, list) else _plain(value)
    return plain


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    return value.name if isinstance(value, Enum) else value


def from_dict(values: Mapping[str, Any], kind: type[Any] = RunConfig, prefix: str = "") -> Any:
    """The config dataclass of plain values, every rule checked.

    Raises ConfigError for a key that is unknown, missing or of another type.
    """
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise ConfigError(prefix + key, values[key], "is not a key of the config", nearest(key, hints))
    arguments = {}
    for key, hint in hints.items():
        if key not in values:
            raise ConfigError(prefix + key, "(missing)", "must be set", f"add {prefix}{key}=...")
        arguments[key] = _typed(values[key], hint, prefix + key)
    return kind(**arguments)


def _typed(value: Any, hint: Any, key: str) -> Any:
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            keys = ", ".join(f"{name}: ..." for name in get_type_hints(hint))
            raise ConfigError(key, value, "must be a group of keys", f"write {{{keys}}}")
        return from_dict(value, hint, key + ".")  # pyright: ignore[reportArgumentType]
    if isinstance(hint, UnionType):
        if value is None:
            return None
        hint = get_args(hint)[0]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _member(value, hint, key)
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(key, value, "must be a list", f"write {key}=[{value}]")
        return [_typed(item, get_args(hint)[0], key) for item in value]
    return _scalar(value, hint, key)


def _member(value: Any, kind: type[Enum], key: str) -> Enum:
    name = value.name if isinstance(value, Enum) else str(value)
    if name not in kind.__members__:
        rule = f"must be one of {', '.join(kind.__members__)}"
        raise ConfigError(key, value, rule, nearest(name, kind.__members__))
    return kind[name]


def _scalar(value: Any, kind: type, key: str) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and value == int(value):
        return int(value)
    if kind is str and is_number:
        return str(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise ConfigError(key, value, f"must be {names[kind]}", f"give {key} {names[kind]}")
