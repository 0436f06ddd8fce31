"""Strict validation: built-in kinds by kubernetes-validate, the others by the operators' own definitions, closed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

BUILT_IN = "1.32"
"""The oldest version that is promised; a field that is newer is refused."""


@cache
def _definition(folder: Path, api: str, kind: str) -> dict[str, Any] | None:
    """The closed schema of one version of a kind."""
    group, _, version = api.partition("/")
    for path in folder.glob(f"{group}_*.json"):
        spec = json.loads(path.read_text())["spec"]
        if spec["names"]["kind"] == kind:
            versions = [one for one in spec["versions"] if one["name"] == version]
            return _close(versions[0]["schema"]["openAPIV3Schema"]) if versions else None
    return None


def _close(node: Any) -> Any:
    """Refuse unknown fields wherever fields are listed."""
    if isinstance(node, list):
        return [_close(item) for item in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _close(value) for key, value in node.items()}
    if node.get("x-kubernetes-int-or-string"):
        closed = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    elif isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def check_built_in(obj: dict[str, Any], version: str = BUILT_IN) -> bool:
    """False where the kind is not built in."""
    try:
        kubernetes_validate.validate(obj, version, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        return False
    return True


def check_defined(obj: dict[str, Any], folder: Path) -> None:
    """`folder`: with the definitions of the operators' kinds."""
    schema = _definition(folder, obj["apiVersion"], obj["kind"])
    assert schema is not None, f"{folder.name} has no {obj['apiVersion']} {obj['kind']}"
    jsonschema.Draft202012Validator(schema).validate(obj)
