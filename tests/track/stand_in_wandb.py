"""A W&B server small enough to read: takes a real client's run over HTTP, or misbehaves on request."""

from __future__ import annotations

import base64
import json
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "stand-in"


class StandInWandb:
    """Use as a context manager. `behave` is `answer`, `throttle` (429 for ever) or `hang` (accepts, never answers)."""

    def __init__(self, behave: str = "answer"):
        self.behave = behave
        self.operations: list[str] = []
        self.lines: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.buckets: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.used: list[dict[str, Any]] = []
        self.puts: dict[str, bytes] = {}
        self.bodies: list[bytes] = []
        self.keys: set[str] = set()
        """API keys with which requests came."""
        self.released = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows that arrived, in order, each with its metrics."""
        return [row for _, row in sorted(self.lines["wandb-history.jsonl"].items())]

    def __enter__(self) -> StandInWandb:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take_stream(self, body: dict[str, Any]) -> None:
        for name, part in (body.get("files") or {}).items():
            for i, line in enumerate(part["content"]):
                self.lines[name][part["offset"] + i] = json.loads(line) if line.startswith("{") else {"text": line}

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            self.take_stream(json.loads(body))
            return {}
        request = json.loads(body)
        return {"data": self.resolve(request["query"], request.get("variables") or {})}

    def resolve(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to one GraphQL request, by the name of its operation."""
        operation = query.split("{")[0].split("(")[0].split()[-1]
        self.operations.append(operation)
        answer = getattr(self, f"_{operation}", None)
        return answer(variables) if answer else {}

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}}

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"model": None}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.buckets.append(variables)
        project = {"name": variables.get("project") or "orchestrator", "entity": {"name": ENTITY}}
        bucket = {"id": "b1", "name": variables.get("name"), "displayName": variables.get("displayName"),
                  "sweepName": None, "historyLineCount": 0, "project": project}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(variables["input"])
        artifact = {"id": f"a{len(self.artifacts)}", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "f1", **self._upload(f"{variables['artifactID']}/manifest.json"), "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m1", "file": file}}}

    _UpdateArtifactManifest = _CreateArtifactManifest

    def _CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        wanted = variables["input"]["artifactFiles"]
        nodes = [
            {**self._upload(f"{f['artifactID']}/{f['name']}"), "storagePath": f["name"], "uploadHeaders": [],
             "uploadMultipartUrls": None, "artifact": {"id": f["artifactID"]}}
            for f in wanted
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _ArtifactByID(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"artifact": None}

    def _CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}

    def _UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.used.append(variables)
        return {"useArtifact": {"artifact": {"id": "a1", "digest": "d"}}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [self._upload(name) for name in variables.get("files") or []]
        return {"createRunFiles": {"runID": "b1", "uploadHeaders": [], "files": files}}

    def _upload(self, name: str) -> dict[str, Any]:
        return {"name": name, "uploadUrl": f"{self.url}/put/{name}"}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news here."""


def _handler(world: StandInWandb) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None: ...

        def do_POST(self) -> None:
            body = self._body()
            world.bodies.append(body)
            credentials = self.headers.get("Authorization", "").removeprefix("Basic ")
            world.keys.add(base64.b64decode(credentials).decode().removeprefix("api:"))
            if world.behave == "hang":
                world.released.wait(60)
            elif world.behave == "throttle":
                self._answer({"error": "slow down"}, 429)
            else:
                self._answer(world.answer(self.path, body))

        def do_PUT(self) -> None:
            world.puts[self.path] = self._body()
            self._answer({})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                return b"".join(iter(self._chunk, b""))
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _chunk(self) -> bytes:
            chunk = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return chunk

        def _answer(self, value: Any, status: int = 200) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
