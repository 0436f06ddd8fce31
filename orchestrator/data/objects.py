"""Objects of S3, Google and Azure stores through obstore, each read by a small process of its own.

obstore's threads do not survive a fork: in a forked loader process its first call would wait for ever (seen with
0.12.1). A child that is started, not forked, works everywhere, and one that hangs can be ended. This file is also what
the child runs; there it imports nothing of this package.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import subprocess
import sys
import threading
from contextlib import suppress
from time import monotonic
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from orchestrator.data.remote import Reply

CONNECT_S = 10
CHUNK = 1 << 20
_STATUS = re.compile(r"(?:status code|status|returned error)[^0-9]{0,20}([45]\d\d)\b|\b([45]\d\d) [A-Z][a-z]")
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
METADATA = "169.254.169.254"
"""Where a machine of a cloud asks who it is."""
_KINDS = {"NotFoundError": 404, "PermissionDeniedError": 403, "UnauthenticatedError": 401, "PreconditionError": 412}


def open_object(url: str, offset: int, version: str | None, stall_s: float) -> Reply:
    """`remote.open_at` for s3, gs and az; keys are those of `cluster.store_secret`, else of the environment."""
    from orchestrator.data.remote import Refused, Reply
    from orchestrator.redact import redact

    child = _Child(url, offset, version, stall_s)
    line = child.line()
    head = json.loads(line) if line else {"error": child.complaint(), "status": None}
    if "error" in head:
        child.close()
        refusal = Refused(redact(head["error"]), head["status"])
        refusal.served = head.get("served")
        raise refusal
    return Reply(cast("IO[bytes]", child), head["start"], head["total"], head["version"])


class _Child:
    """The reading process: a line of JSON, then bytes."""

    def __init__(self, url: str, offset: int, version: str | None, stall_s: float):
        from orchestrator.secrets import store_keys

        command = [sys.executable, "-P", __file__]  # -P: the modules beside this file are not top-level ones
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        self._stall_s = stall_s
        assert self._process.stdin
        assert self._process.stdout
        self._out = self._process.stdout.fileno()
        with suppress(OSError):  # a user's pipes may hold only so much
            fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, CHUNK)
        # by stdin: every user may read arguments
        request = {"url": url, "offset": offset, "version": version, "keys": store_keys()}
        with suppress(BrokenPipeError):  # it died at once; `complaint` says of what
            self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def line(self) -> bytes:
        from orchestrator.data.remote import Refused

        line, deadline = b"", monotonic() + self._stall_s + CONNECT_S
        while not line.endswith(b"\n"):
            if not select.select([self._out], [], [], max(0.0, deadline - monotonic()))[0]:
                self.close()
                raise Refused(f"no answer within {self._stall_s + CONNECT_S:g} s")
            byte = os.read(self._out, 1)
            if not byte:
                return b""
            line += byte
        return line

    def read1(self, size: int) -> bytes:
        from orchestrator.data.remote import Refused
        from orchestrator.redact import redact

        if not select.select([self._out], [], [], self._stall_s)[0]:
            raise Refused(f"no byte for {self._stall_s:g} s")
        chunk = os.read(self._out, size)
        if not chunk and self._process.wait():
            raise Refused(redact(self.complaint()))
        return chunk

    def complaint(self) -> str:
        assert self._process.stderr
        lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"the reading process ended with {self._process.wait()}"

    def close(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                stream.close()
        self._process.wait()


def store_of(url: str, keys: dict[str, str]) -> tuple[Any, str]:
    """The store of an address, and the object's path in it: SCHEME://BUCKET/PATH, for az the bucket is a container.

    `keys`: variables that count before those of the environment.
    """
    from obstore.store import AzureStore, GCSStore, S3Store

    scheme, rest = url.split("://", 1)
    bucket, _, path = rest.partition("/")
    kinds = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    if scheme.lower() not in kinds:
        raise ValueError(f"{scheme}:// is none of {', '.join(kinds)}")
    kind = kinds[scheme.lower()]
    told = {**os.environ, **keys}
    plain = any(told.get(name, "").startswith("http://") for name in ENDPOINTS)
    # the whole transfer has no limit here: the parent ends a child that is silent
    options: dict[str, Any] = {"connect_timeout": f"{CONNECT_S}s", "timeout": "7 days"}
    if plain or told.get("AWS_ALLOW_HTTP") == "true":
        options["allow_http"] = True
    config: Any = {name.lower(): value for name, value in keys.items() if name != "AWS_ALLOW_HTTP"}
    return kind(bucket, config=config, client_options=options, retry_config={"max_retries": 0}), path


class Unusable(Exception):
    """The address or the keys are none."""


def _open(request: dict[str, Any]) -> Any:
    try:
        store, path = store_of(request["url"], request["keys"])
    except Exception as error:  # all that a client library raises
        raise Unusable(str(error)) from None
    options: dict[str, Any] = {}
    if request["offset"]:
        options["range"] = {"offset": request["offset"]}
        if request["version"]:
            options["if_match"] = request["version"]
    return store.get(path, options=options)


def _send(got: Any) -> None:
    head = {"start": got.range[0], "total": got.meta["size"], "version": got.meta["e_tag"]}
    write_out(json.dumps(head).encode() + b"\n")
    for chunk in got.stream(min_chunk_size=CHUNK // 4):
        write_out(chunk)


def write_out(data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def status_of(kind: str, text: str) -> int | None:
    """The HTTP status in an error of obstore, which shows it in its text only."""
    if kind == "Unusable":
        return 400
    found = _STATUS.search(text)
    return _KINDS.get(kind) or (int(found[1] or found[2]) if found else None)


def shorten(text: str) -> str:
    """The code and message of a store's XML answer, else the first sentence of obstore's report."""
    text = " ".join(text.split())
    code, message = (re.search(f"<{tag}>(.*?)</{tag}>", text) for tag in ("Code", "Message"))
    if code:
        return f"{code[1]}: {message[1].partition(' RequestId:')[0] if message else ''}"
    text = text.split(" Debug source")[0]
    if METADATA in text:
        return (
            f"no keys are given, and this machine has no identity of its own there ({text.rpartition(' - ')[2][:150]})"
        )
    return text[:300]


def main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        got = _open(request)
    except Exception as error:  # all that a client library raises
        status = status_of(type(error).__name__, str(error))
        write_out(json.dumps({"error": shorten(str(error)), "status": status}).encode() + b"\n")
        os._exit(0)
    try:
        _send(got)
    except Exception as error:
        os.write(2, shorten(str(error)).encode())
        os._exit(1)
    os._exit(0)  # without waiting for the thread at stdin


if __name__ == "__main__":
    main()
