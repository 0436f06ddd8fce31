"""Servers of Azure's and Google's object stores for tests: Azurite, and fake-gcs-server behind a front.

Both come through npm and the Go proxy into $ORCHESTRATOR_TEST_CACHE or ~/.cache/orchestrator-tests, once. The fake of
Google's has the JSON interface whole but of the XML one only what reads; obstore writes through XML. The front turns
those writes into the JSON ones, whose preconditions the fake honours, and asks for a token, which the fake does not.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

AZURITE = "azurite@3.37.0"
GCS = "github.com/fsouza/fake-gcs-server@v1.56.1"
INSTALL_S = 900
START_S = 60
TOKEN = "test-token"
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's own, the same everywhere."""
AZURE_VERSION = "2021-08-06"


def cache() -> Path:
    return Path(os.environ.get("ORCHESTRATOR_TEST_CACHE") or Path.home() / ".cache" / "orchestrator-tests")


def installed(program: Path, tool: str, *command: str, **env: str) -> Path:
    """A program that `tool` can install. Skips where the tool is missing, fails where it cannot do it."""
    if program.exists():
        return program
    if shutil.which(tool) is None:
        pytest.skip(f"NO EMULATOR: {tool} is missing, which would install {program.name}")
    done = subprocess.run(
        [tool, *command], capture_output=True, text=True, timeout=INSTALL_S, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return program


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Emulator:
    """A server with one bucket (of Azure: container) named `shards`; `env` is how a client finds it."""

    scheme = ""
    missing = refused = ""
    """What it says of a bucket that is not there, and of wrong keys."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.env: dict[str, str] = {}
        self.wrong_keys: dict[str, str] = {}

    def start(self) -> None:
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, cwd=self.folder)
        until = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                assert time.monotonic() < until, (self.folder / "server.log").read_text()
                time.sleep(0.1)
        self.make_bucket("shards")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def command(self) -> list[str]:
        raise NotImplementedError

    def make_bucket(self, name: str) -> None:
        raise NotImplementedError


class Azurite(Emulator):
    scheme, missing, refused = "az", "ContainerNotFound", "AuthorizationFailure"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.env = {"AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{self.port}/{ACCOUNT}",
                    "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY}  # fmt: skip
        self.wrong_keys = {"AZURE_STORAGE_ACCOUNT_KEY": base64.b64encode(b"canary").decode()}

    def command(self) -> list[str]:
        place = cache() / "azurite"
        program = place / "node_modules" / ".bin" / "azurite-blob"
        installed(program, "npm", "install", "--no-audit", "--no-fund", f"--prefix={place}", AZURITE)
        options = ["--skipApiVersionCheck", "--disableTelemetry", "--silent", f"--location={self.folder / 'data'}"]
        return [str(program), *options, f"--blobPort={self.port}"]

    def make_bucket(self, name: str) -> None:
        date = formatdate(usegmt=True)
        path = f"/{ACCOUNT}/{name}"
        lines = ["PUT", *[""] * 11, f"x-ms-date:{date}", f"x-ms-version:{AZURE_VERSION}", f"/{ACCOUNT}{path}",
                 "restype:container"]  # fmt: skip
        key = base64.b64decode(ACCOUNT_KEY)
        signed = base64.b64encode(hmac.digest(key, "\n".join(lines).encode(), "sha256")).decode()
        headers = {"x-ms-date": date, "x-ms-version": AZURE_VERSION, "Authorization": f"SharedKey {ACCOUNT}:{signed}"}
        status, _, content = ask(self.port, "PUT", f"{path}?restype=container", b"", headers)
        assert status == 201, content


class FakeGcs(Emulator):
    scheme, missing, refused = "gs", "NoSuchBucket", "AuthenticationRequired"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.front = ThreadingHTTPServer(("127.0.0.1", 0), Front)
        self.front.daemon_threads = True
        self.front.upstream = self.port  # pyright: ignore[reportAttributeAccessIssue]
        self.front.uploads = {}  # pyright: ignore[reportAttributeAccessIssue]
        url = f"http://127.0.0.1:{self.front.server_address[1]}"
        self.env = {"GOOGLE_BASE_URL": url, "GOOGLE_BEARER_TOKEN": TOKEN}
        self.wrong_keys = {"GOOGLE_BEARER_TOKEN": "canary"}

    def command(self) -> list[str]:
        program = cache() / "bin" / "fake-gcs-server"
        installed(program, "go", "install", GCS, GOBIN=str(program.parent))
        host = f"127.0.0.1:{self.port}"
        return [str(program), "-scheme=http", "-host=127.0.0.1", f"-port={self.port}", f"-public-host={host}",
                "-backend=memory", f"-external-url=http://{host}"]  # fmt: skip

    def start(self) -> None:
        super().start()
        threading.Thread(target=self.front.serve_forever, daemon=True).start()

    def stop(self) -> None:
        super().stop()
        self.front.shutdown()
        self.front.server_close()

    def make_bucket(self, name: str) -> None:
        body, headers = json.dumps({"name": name}).encode(), {"Content-Type": "application/json"}
        status, _, content = ask(self.port, "POST", "/storage/v1/b", body, headers)
        assert status == 200, content


Reply = tuple[int, dict[str, str], bytes]


def ask(port: int, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


class Front(BaseHTTPRequestHandler):
    """Google's XML interface over the fake server."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.serve
        raise AttributeError(name)

    def serve(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._say(*problem(401, "AuthenticationRequired", "Authentication required."))
            return
        place, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        bucket, _, key = place.path.lstrip("/").partition("/")
        if self.command in ("PUT", "POST") or (self.command == "DELETE" and "uploadId" in query):
            self._say(*self._write(bucket, unquote(key), query, body))
            return
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "authorization")}
        status, headers, content = ask(self.server.upstream, self.command, self.path, b"", kept)  # pyright: ignore
        match = self.headers.get("If-Match")
        if match is not None and status < 400 and headers.get("Etag", headers.get("ETag")) != match:
            status, headers, content = problem(412, "PreconditionFailed", "At least one precondition failed.")
        self._say(status, headers, content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _write(self, bucket: str, key: str, query: dict[str, list[str]], body: bytes) -> Reply:
        uploads: dict[str, dict[int, bytes]] = self.server.uploads  # pyright: ignore
        if "uploads" in query:
            name = f"u{len(uploads)}"
            uploads[name] = {}
            return 200, {}, xml("InitiateMultipartUploadResult", Bucket=bucket, Key=key, UploadId=name)
        if "uploadId" not in query:
            return self._put(bucket, key, body)
        name = query["uploadId"][0]
        if self.command == "PUT":
            uploads[name][int(query["partNumber"][0])] = body
            return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""
        parts = uploads.pop(name)
        if self.command == "DELETE":
            return 204, {}, b""
        wanted = [int(found) for found in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body)]
        status, headers, content = self._put(bucket, key, b"".join(parts[number] for number in wanted))
        if status == 200:
            content = xml("CompleteMultipartUploadResult", Bucket=bucket, Key=key, ETag=headers["ETag"])
        return status, headers, content

    def _put(self, bucket: str, key: str, body: bytes) -> Reply:
        generation = self.headers.get("x-goog-if-generation-match")
        condition = "" if generation is None else f"&ifGenerationMatch={generation}"
        path = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(key, safe='')}{condition}"
        status, _, content = ask(self.server.upstream, "POST", path, body, {"Content-Type": "application/octet-stream"})  # pyright: ignore
        if status == 412:
            return problem(412, "PreconditionFailed", "At least one of the preconditions you specified did not hold.")
        if status == 404:
            return problem(404, "NoSuchBucket", "The specified bucket does not exist.")
        made = json.loads(content)
        return status, {"ETag": f'"{made["etag"]}"', "x-goog-generation": str(made["generation"])}, b""

    def _say(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = next((value for name, value in headers.items() if name.lower() == "content-length"), None)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def problem(status: int, code: str, message: str) -> Reply:
    return status, {"Content-Type": "application/xml"}, xml("Error", Code=code, Message=message)


def xml(_name: str, **fields: str) -> bytes:
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    return f"<?xml version='1.0' encoding='UTF-8'?><{_name}>{inner}</{_name}>".encode()
