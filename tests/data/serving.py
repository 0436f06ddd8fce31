"""A web server that misbehaves on request: each fault is used up by the answers that it spoils."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """What one answer does wrong."""

    status: int = 0
    """Answered instead of the content."""
    retry_after: str = ""
    cut_at: int | None = None
    """Bytes of the body after which the connection closes."""
    stall_s: float = 0.0
    """Silence after `cut_at` bytes, before the connection closes."""
    flip_at: int | None = None
    """Byte of the body with a flipped bit."""
    length_off: int = 0
    """Added to the Content-Length and to the total of a Content-Range."""
    no_length: bool = False
    ignore_range: bool = False
    version: str | None = None
    """ETag of the answer; "" for none."""
    content: bytes | None = None
    """Sent instead of the file."""


@dataclass
class Served:
    """A folder behind HTTP, and what was asked for."""

    folder: Path
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    """For the next requests of tars, in turn; then all is well."""
    always: Fault | None = None
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, Range) of each request"""
    times: list[float] = field(default_factory=list)
    pace_s: float = 0.0
    """Pause after each piece of 64 KiB."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, path: str, range: str | None) -> Fault:
        path = path.split("?")[0]
        with self.lock:
            self.requests.append((path, range))
            self.times.append(time.monotonic())
            if not path.endswith(".tar"):
                return Fault()
            return self.faults.pop(0) if self.faults else self.always or Fault()

    def ranges(self) -> list[str | None]:
        return [range for path, range in self.requests if path.endswith(".tar")]


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    served = Served(folder)

    class Handler(_Handler):
        state = served

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request, client_address) -> None: ...  # clients that were killed, as planned

    with Server(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join(10)


class _Handler(http.server.BaseHTTPRequestHandler):
    state: Served
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.close_connection = True
        asked = self.headers.get("Range")
        fault = self.state.fault(self.path, asked)
        path = self.state.folder / self.path.split("?")[0].lstrip("/")
        if fault.status or not path.is_file():
            return self._refuse(fault.status or 404, fault.retry_after)
        content = path.read_bytes() if fault.content is None else fault.content
        return self._answer(content, asked, fault)

    def _refuse(self, status: int, retry_after: str) -> None:
        self.send_response(status)
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, content: bytes, asked: str | None, fault: Fault) -> None:
        version = f'"{hash(content) & 0xFFFFFF:x}"' if fault.version is None else fault.version
        start = int(match[1]) if asked and (match := re.match(r"bytes=(\d+)-", asked)) else 0
        if fault.ignore_range or self.headers.get("If-Range", version) != version:
            asked, start = None, 0
        if asked and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = content[start:]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content) + fault.length_off}")
        if not fault.no_length:
            self.send_header("Content-Length", str(len(body) + fault.length_off))
        if version:
            self.send_header("ETag", version)
        self.send_header("Connection", "close")
        self.end_headers()
        return self._send(body, fault)

    def _send(self, body: bytes, fault: Fault) -> None:
        if fault.flip_at is not None:
            body = body[: fault.flip_at] + bytes([body[fault.flip_at] ^ 1]) + body[fault.flip_at + 1 :]
        with suppress(OSError):
            body = body[: fault.cut_at]
            for at in range(0, len(body), 1 << 16):
                self.wfile.write(body[at : at + (1 << 16)])
                time.sleep(self.state.pace_s)
            self.wfile.flush()
            time.sleep(fault.stall_s)

    def log_message(self, *args: object) -> None: ...
