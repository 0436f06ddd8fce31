"""Files of web servers, by ranges."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import IO, Any, cast

from orchestrator.data.remote import Refused, Reply
from orchestrator.errors import DataError
from orchestrator.redact import redact

CONNECT_S = 10.0
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


def open_web(url: str, offset: int, version: str | None, stall_s: float) -> Reply:
    """`remote.open_at` for http and https; proxies, certificates and .netrc are those that requests finds."""
    import requests

    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if version and not version.startswith("W/"):  # a weak ETag does not vouch for bytes (RFC 9110, 13.1.5)
            headers["If-Range"] = version
    try:
        answer = requests.get(url, headers=headers, stream=True, timeout=(CONNECT_S, stall_s))
    except ValueError as error:
        raise DataError(f"{redact(str(error))}: this address cannot be parsed. Way out: mend it") from None
    except requests.RequestException as error:
        raise Refused(f"{type(error).__name__}: {_reason(error)}") from None
    if answer.status_code not in (200, 206):
        raise _refusal(answer)
    start, total = _extent(answer)
    return Reply(cast("IO[bytes]", _Body(answer)), start, total, answer.headers.get("ETag"))


def _reason(error: Any) -> str:
    inner = getattr(error.args[0], "reason", error.args[0]) if error.args else error
    return redact(str(inner))


def _refusal(answer: Any) -> Refused:
    refusal = Refused(
        f"{answer.status_code} {answer.reason}", answer.status_code, retry_after(answer.headers.get("Retry-After"))
    )
    if answer.status_code == 416:
        refusal.served = _extent(answer)[1]
    answer.close()
    return refusal


def _extent(answer: Any) -> tuple[int, int | None]:
    """First byte and length of the whole, as the headers say."""
    found = _RANGE.match(answer.headers.get("Content-Range", ""))
    if found and answer.status_code in (206, 416):
        return int(found[1] or 0), int(found[2]) if found[2] != "*" else None
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header: a number of seconds or a date (RFC 9110, 10.2.3)."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


class _Body:
    """A response's bytes as they arrive; a broken connection is an OSError."""

    def __init__(self, answer: Any):
        self._answer = answer

    def read1(self, size: int) -> bytes:
        from urllib3.exceptions import HTTPError

        try:
            return self._answer.raw.read1(size, decode_content=False)
        except (HTTPError, OSError) as error:
            raise Refused(f"{type(error).__name__}: {_reason(error)}") from None

    def close(self) -> None:
        self._answer.close()
