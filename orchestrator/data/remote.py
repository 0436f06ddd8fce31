"""Addresses that are not local paths: which are read, and how one is opened at a byte of one's choice."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, cast
from urllib.parse import urljoin

from orchestrator.errors import DataError
from orchestrator.redact import redact

WEB = ("http", "https")
STORES = ("s3", "gs", "az")
SCHEMES = (*WEB, *STORES)
ALLOW_PIPE = "ORCHESTRATOR_ALLOW_PIPE"

_CHUNK = 1 << 20


class Refused(OSError):
    """A server answered with an error, or the connection failed (then `status` is None)."""

    def __init__(self, text: str, status: int | None = None, retry_after: float | None = None):
        super().__init__(text)
        self.status, self.retry_after = status, retry_after
        self.served: int | None = None
        """Length of what is served, where the answer (416) tells it."""


@dataclass
class Reply:
    """Bytes of a remote file as they come."""

    body: IO[bytes]
    start: int = 0
    """The byte of the file at which `body` begins: 0 where a server ignores ranges."""
    total: int | None = None
    """Length of the whole file, in bytes, where the server tells it."""
    version: str | None = None
    """What changes with the content: an ETag."""

    def read(self) -> bytes:
        """What has arrived, at least one byte; empty at the end. Raises OSError."""
        body: Any = self.body
        with _network_errors():
            return body.read1(_CHUNK) if hasattr(body, "read1") else body.read(_CHUNK)

    def close(self) -> None:
        with suppress(Exception):  # an opener's own complaint about an early end
            self.body.close()


@contextmanager
def _network_errors() -> Iterator[None]:
    """An opener's OSError is the network's, whatever its errno: one with an errno is taken for the disk's elsewhere."""
    try:
        yield
    except Refused:
        raise
    except OSError as error:
        raise Refused(redact(str(error))) from error


def is_url(location: str) -> bool:
    return "://" in location or location.startswith("pipe:")


def beside(base: str, name: str) -> str:
    """The address of a file beside another one; urljoin knows the web's schemes only."""
    if base.split(":", 1)[0].lower() in WEB:
        return urljoin(base, name)
    return f"{base.rsplit('/', 1)[0]}/{name}"


def open_at(url: str, offset: int, version: str | None, stall_s: float) -> Reply:
    """The bytes of `url` from `offset` on, or from its start where ranges are not served.

    `version` is that of an earlier reply: other content is sent from its start. After `stall_s` seconds without a byte
    the connection counts as broken. Raises Refused, DataError for addresses that are not read.
    """
    scheme = url.split(":", 1)[0].lower()
    opener = _registered(scheme)
    if opener:
        with _network_errors():
            return Reply(cast("IO[bytes]", opener(url, "rb")))
    if scheme in WEB:
        from orchestrator.data.web import open_web

        return open_web(url, offset, version, stall_s)
    if scheme in STORES:
        from orchestrator.data.objects import open_object

        return open_object(url, offset, version, stall_s)
    if scheme == "pipe" and os.environ.get(ALLOW_PIPE) == "1":
        from webdataset.gopen import gopen

        return Reply(cast("IO[bytes]", gopen(url, "rb")))
    raise _unread(url, scheme)


def _registered(scheme: str) -> Any:
    """An opener that the user put into `webdataset.gopen_schemes`; those it comes with run shell commands."""
    gopen = sys.modules.get("webdataset.gopen")
    opener = gopen.gopen_schemes.get(scheme) if gopen else None
    return opener if opener and opener.__module__ != "webdataset.gopen" else None


def _unread(url: str, scheme: str) -> DataError:
    known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    if scheme == "pipe":
        return DataError(
            f"pipe: is not read, since such an address would run a command. Way out: {known} or a local "
            f"path; or {ALLOW_PIPE}=1 in the environment, if you trust every command in the index"
        )
    return DataError(
        f"{redact(url)}: {scheme}: is not read. Way out: {known}, a local path, or an opener of yours in "
        "webdataset.gopen_schemes"
    )
