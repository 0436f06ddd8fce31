"""Addresses that are not local paths, and the one way they are opened."""

from __future__ import annotations

from contextlib import AbstractContextManager, closing
from typing import IO, cast

from orchestrator.errors import DataError

SCHEMES = ("http", "https", "s3", "gs")


def is_url(location: str) -> bool:
    return "://" in location or location.startswith("pipe:")


def open_url(url: str) -> AbstractContextManager[IO[bytes]]:
    """The bytes of a URL by WebDataset's openers; network failures are OSErrors without an errno.

    Raises DataError for `pipe:` and unknown schemes: an index must not run commands.
    """
    scheme = url.split(":", 1)[0].lower()
    if scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise DataError(f"{url}: {scheme}: is not read. Way out: {known} or a local path")
    from webdataset.gopen import gopen

    return closing(cast("IO[bytes]", gopen(url, "rb")))
