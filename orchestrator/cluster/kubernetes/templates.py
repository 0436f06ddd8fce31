"""The templates of `k8s/templates`, filled by structure: a slot is a whole value, never a piece of text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import orchestrator

SLOT = re.compile(r"\$\{(\w+)\}")
PLAIN = re.compile(r"(?!(?i:y|n|yes|no|on|off|true|false|null)$)[A-Za-z/_][^\n]*")
"""Text that every YAML reader takes for text; others find numbers in `1e3` or `0x10` where PyYAML sees none."""


def templates_dir() -> Path:
    """Inside the installed package, or in the checkout beside it."""
    package = Path(orchestrator.__file__).parent
    inside = package / "k8s" / "templates"
    return inside if inside.is_dir() else package.parent / "k8s" / "templates"


@cache
def _template(name: str) -> Any:
    return yaml.safe_load((templates_dir() / f"{name}.yaml").read_text())


def template(file: str, /, **values: Any) -> Any:
    """The template in `file` with a value in each of its slots.

    A value that is None or empty takes its key or item away; a list in the place of an item becomes items. Values are
    not searched for slots.
    """
    return _fill(_template(file), values)


def _fill(node: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(node, dict):
        filled = {key: _fill(value, values) for key, value in node.items()}
        return {key: value for key, value in filled.items() if not _is_empty(value)}
    if isinstance(node, list):
        return [item for each in node for item in _items(each, values)]
    slot = SLOT.fullmatch(node) if isinstance(node, str) else None
    return values[slot[1]] if slot else node


def _items(node: Any, values: Mapping[str, Any]) -> list[Any]:
    filled = _fill(node, values)
    if _is_empty(filled):
        return []
    return filled if isinstance(filled, list) else [filled]


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, dict | list) and not value)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None if PLAIN.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(objects: Iterable[Mapping[str, Any]]) -> str:
    """One document for each object, as `kubectl apply -f` reads them."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, explicit_start=True, width=120)
