"""Takes out of a config what may open a door: user names, passwords and signed queries inside addresses."""

from __future__ import annotations

import re
from typing import Any

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(?<=\w)(://[^\s?]+)\?\S+")


def without_secrets(value: Any) -> Any:
    """The same nested value with every address in it stripped; a `pipe:` command keeps its program only."""
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return _without_secrets(value) if isinstance(value, str) else value


def _without_secrets(text: str) -> str:
    if text.startswith("pipe:"):
        return " ".join([*text.split()[:1], "..."])
    if "://" not in text:
        return text
    return _QUERY.sub(r"\1?...", _CREDENTIALS.sub("...@", text))
