"""Where the label of a sample stands and what number it is: a member of its own, or a field of its JSON member."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from orchestrator.data.members import Member

LONGEST = 1000
LONGEST_JSON = 16 << 20
SHOWN = 40

_NUMERIC = re.compile(r"[-+]?[0-9.][-+0-9.,eE]*")


def split_label(label: str) -> tuple[str, str]:
    """Extension of the members that hold labels, and the field of `json:FIELD`, else nothing."""
    extension, _, field = label.partition(":")
    return extension, field


def read_label(fd: int, member: Member, field: str) -> str:
    """The label as it stands there: digits or a name. Raises ValueError where it is neither."""
    if field:
        return _read_field(fd, member, field)
    data = os.pread(fd, min(member.size, LONGEST + 1), member.offset)
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text.isprintable() or not text or len(data) > LONGEST:
        raise ValueError(f"label {data[:SHOWN]!r} is neither an integer from 0 up nor a name")
    _require_whole(text, data[:SHOWN])
    return text


def _require_whole(text: str, shown: object) -> None:
    """-1, 1.5, 1e3 and 2,3 are no class numbers, and nobody means them as names."""
    if _NUMERIC.fullmatch(text) and not is_number(text):
        raise ValueError(f"label {shown!r} is not an integer from 0 up")


def _read_field(fd: int, member: Member, field: str) -> str:
    try:
        body: Any = json.loads(os.pread(fd, min(member.size, LONGEST_JSON), member.offset))
    except ValueError as error:
        raise ValueError(f"{member.extension} is not JSON ({error})") from error
    if not isinstance(body, dict) or field not in body:
        fields = ", ".join(map(str, body)) if isinstance(body, dict) else "none"
        raise ValueError(f"JSON has no field {field}; its fields: {fields}")
    value = body[field]
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).strip():
        raise ValueError(f"{field} {value!r} is neither an integer from 0 up nor a name")
    _require_whole(str(value).strip(), value)
    return str(value).strip()


def is_number(text: str) -> bool:
    """Whether digits say a number that an int64 holds."""
    return text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) < 2**63


def number_of(text: str, numbers: Mapping[str, int]) -> int:
    """The class number that digits are, or that a name has. Raises ValueError."""
    if is_number(text):
        return int(text)
    if text not in numbers:
        known = f"one of the {len(numbers)} class names" if numbers else "an integer from 0 up"
        raise ValueError(f"label {text[:SHOWN]!r} is not {known}")
    return numbers[text]
