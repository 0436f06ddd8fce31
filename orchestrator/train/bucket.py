"""A folder of an object store that can be written, through a process of its own.

obstore's threads do not survive a fork and ranks are forked, so a process that is started talks to the store; one that
hangs is ended and started anew. Requests and answers are lines of JSON; contents go from file to store and back
without passing through the rank. This file is also what that process runs.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from orchestrator.secrets import store_keys

PIECE = 8 << 20
CHILD = "import sys; sys.path.append(sys.argv[1]); from orchestrator.train.bucket import main; main()"
ABSENT = ""
"""As a version: the object must not exist yet."""


class StoreError(OSError):
    """The store did not do it; `passing` where a later try may succeed."""

    def __init__(self, text: str, passing: bool = True):
        super().__init__(text)
        self.passing = passing


class Conflict(StoreError):
    """The object is not the version that was expected."""


class Bucket:
    """Objects below an address such as s3://bucket/prefix; used by one thread at a time."""

    def __init__(self, url: str, silence_s: float = 60.0):
        """`silence_s`: after so long without a sign of the store a request has failed."""
        self.url = url.rstrip("/")
        self._silence_s = silence_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pending, self._closed = b"", False

    def put_file(self, key: str, path: Path) -> None:
        self._ask("put_file", key=key, path=str(path.resolve()))

    def put(self, key: str, content: bytes, version: str | None = None) -> str | None:
        """Write a small object, only over `version` of it where that is given; returns the new version."""
        return self._ask("put", key=key, content=base64.b64encode(content).decode(), version=version)

    def get(self, key: str) -> tuple[bytes, str | None] | None:
        """Content and version of a small object; None where there is none."""
        found = self._ask("get", key=key)
        return found and (base64.b64decode(found[0]), found[1])

    def get_file(self, key: str, path: Path) -> bool:
        """Whether there is one."""
        return self._ask("get_file", key=key, path=str(path.resolve()))

    def names(self) -> list[str]:
        """Keys of all objects."""
        return sorted(self.entries())

    def entries(self, below: str = "") -> dict[str, tuple[int, str]]:
        """Size in bytes and a mark that changes with the content, by key, of all objects or of those in a folder."""
        return {key: (size, mark) for key, size, mark in self._ask("entries", below=below)}

    def folders(self) -> list[str]:
        """First parts of keys that have more than one; costs no look at what is in them."""
        return self._ask("folders")

    def remove(self, key: str) -> None:
        """Without complaint where there is none."""
        self._ask("remove", key=key)

    def close(self) -> None:
        """For good, also amid a request of another thread, which fails then."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        process, self._process, self._pending = self._process, None, b""
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream:
                stream.close()
        process.wait()

    def _ask(self, what: str, **request: Any) -> Any:
        if self._closed:
            raise StoreError(f"{self.url}: closed")
        process = self._process or self._start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"what": what, **request}).encode() + b"\n")
            while True:
                answer = json.loads(self._line(process))
                if "at" not in answer:  # else: so many bytes have gone
                    break
        except (OSError, ValueError) as error:
            self._end()
            raise error if isinstance(error, StoreError) else StoreError(f"{self.url}: {error}") from None
        if "error" in answer:
            kind = Conflict if answer["conflict"] else StoreError
            raise kind(f"{self.url}: {answer['error']}", answer["passing"])
        return answer["done"]

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[2])
        command = [sys.executable, "-P", "-c", CHILD, root]
        self._process = process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert process.stdin is not None
        first = {"url": self.url, "keys": store_keys()}  # not as arguments, which all may read
        process.stdin.write(json.dumps(first).encode() + b"\n")
        return process

    def _line(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        until, out = monotonic() + self._silence_s, process.stdout.fileno()
        while b"\n" not in self._pending:
            if not select.select([out], [], [], max(0.0, until - monotonic()))[0]:
                raise StoreError(f"{self.url}: no answer within {self._silence_s:g} s")
            piece = os.read(out, 1 << 16)
            if not piece:
                raise StoreError(f"{self.url}: the process that talks to the store ended")
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        return line


class Server:
    """The other side: one store, one request after the other."""

    def __init__(self, url: str, keys: dict[str, str]):
        self._store, self._prefix = _open_store(url, keys)
        self._version = "version" if url.startswith("gs://") else "e_tag"
        """What a conditional put goes by: Google's is the number of the object's generation."""

    def put_file(self, key: str, path: str) -> None:
        content = Path(path)
        small = content.stat().st_size <= PIECE
        self._store.put(self._prefix + key, content.read_bytes() if small else _pieces(content))

    def put(self, key: str, content: str, version: str | None) -> str | None:
        mode: Any = "overwrite" if version is None else "create" if version == ABSENT else {self._version: version}
        data = base64.b64decode(content)
        try:
            put = self._store.put(self._prefix + key, data, mode=mode)
        except NotImplementedError:  # a local folder has no versions
            put = self._store.put(self._prefix + key, data)
        return put[self._version]

    def get(self, key: str) -> tuple[str, str | None] | None:
        try:
            found = self._store.get(self._prefix + key)
            return base64.b64encode(bytes(found.bytes())).decode(), found.meta[self._version]
        except FileNotFoundError:
            return None

    def get_file(self, key: str, path: str) -> bool:
        sent = 0
        try:
            found = self._store.get(self._prefix + key)
        except FileNotFoundError:
            return False
        with open(path, "wb") as file:
            for chunk in found.stream(min_chunk_size=PIECE // 8):
                file.write(chunk)
                sent += len(chunk)
                _say({"at": sent})
            file.flush()
            os.fsync(file.fileno())
        return True

    def entries(self, below: str) -> list[tuple[str, int, str]]:
        found = [entry for batch in self._store.list(self._prefix + below or None) for entry in batch]
        return [(one["path"].removeprefix(self._prefix), one["size"], _mark(one)) for one in found]

    def folders(self) -> list[str]:
        found = self._store.list_with_delimiter(self._prefix or None)["common_prefixes"]
        return sorted(path.removeprefix(self._prefix).rstrip("/") for path in found)

    def remove(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._store.delete(self._prefix + key)


def _open_store(url: str, keys: dict[str, str]) -> tuple[Any, str]:
    """The store of an address and what every key in it begins with."""
    if url.startswith("file://"):
        from obstore.store import LocalStore

        return LocalStore(url.removeprefix("file://"), mkdir=True), ""
    from orchestrator.data.objects import store_of

    store, path = store_of(url, keys)
    return store, f"{path}/" if path else ""


def _mark(entry: Any) -> str:
    return entry["e_tag"] or entry["last_modified"].isoformat()


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece
            _say({"at": file.tell()})


def _say(answer: Any) -> None:
    from orchestrator.data.objects import write_out

    write_out(json.dumps(answer).encode() + b"\n")


def _answer(server: Server, request: dict[str, Any]) -> dict[str, Any]:
    from orchestrator.data.objects import shorten, status_of

    try:
        return {"done": getattr(server, request.pop("what"))(**request)}
    except Exception as error:  # all that a client library raises
        kind, text = type(error).__name__, str(error)
        status = status_of(kind, text)
        conflict = kind in ("PreconditionError", "AlreadyExistsError", "FileExistsError") or status == 412
        passing = status is None or status == 429 or status >= 500
        return {"error": shorten(text), "conflict": conflict, "passing": passing}


def main() -> None:
    requests: queue.Queue[bytes] = queue.Queue()
    first = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    server: Server | None = None
    while True:
        request = json.loads(requests.get())
        try:
            server = server or Server(first["url"], first["keys"])
        except Exception as error:
            from orchestrator.data.objects import shorten

            _say({"error": shorten(str(error)), "conflict": False, "passing": False})
            continue
        _say(_answer(server, request))


def _read(requests: queue.Queue[bytes]) -> None:
    """Requests, until the rank has ended: then this process ends too, whatever it is doing."""
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)
