"""Ray's dashboard as far as a submitter meets it: tokens, versions, packages, jobs and their logs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeRay:
    """What the server holds and how it behaves; tests change it while it runs."""

    token: str | None = "secret-token"
    version: Any = field(default_factory=lambda: {"version": "4", "ray_version": "2.60.0"})
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and authorization of each."""
    refuse: str | None = None
    """Why jobs are refused."""
    raced: bool = False
    """Another submitter gets in between the look and the submission."""
    redirect: str | None = None
    address: str = ""

    def add(self, submission_id: str, request: dict[str, Any], status: str = "RUNNING", **more: Any) -> None:
        start = 1000 + len(self.jobs)
        self.jobs[submission_id] = {
            **request,
            "submission_id": submission_id,
            "status": status,
            "start_time": start,
            **more,
        }

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/version":
            return 200, self.version
        if path.startswith("/api/packages/gcs/"):
            return self._package(method, path.rpartition("/")[2], body)
        if path == "/api/jobs/":
            return (200, list(self.jobs.values())) if method == "GET" else self._submit(json.loads(body))
        submission_id, _, what = path.removeprefix("/api/jobs/").partition("/")
        if submission_id not in self.jobs:
            return 404, f"Job {submission_id} does not exist"
        return self._job(method, submission_id, what)

    def _package(self, method: str, name: str, body: bytes) -> tuple[int, Any]:
        if method == "PUT":
            self.packages[name] = body
        return (200, {}) if name in self.packages else (404, "no such package")

    def _submit(self, request: dict[str, Any]) -> tuple[int, Any]:
        if self.refuse:
            return 500, self.refuse
        submission_id = request["submission_id"]
        if self.raced:
            self.add(submission_id, request)
        if submission_id in self.jobs:
            return 400, f"Job with submission_id {submission_id} already exists. Please use a different submission_id."
        self.add(submission_id, request, "PENDING")
        return 200, {"submission_id": submission_id}

    def _job(self, method: str, submission_id: str, what: str) -> tuple[int, Any]:
        job = self.jobs[submission_id]
        if what == "logs":
            return 200, {"logs": self.logs.get(submission_id, "")}
        if what == "stop":
            job["status"] = "STOPPED"
            return 200, {"stopped": True}
        if method == "DELETE":
            del self.jobs[submission_id]
            return 200, {"deleted": True}
        return 200, job


@contextmanager
def serving(ray: FakeRay) -> Iterator[FakeRay]:
    """The server on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            authorization = self.headers.get("Authorization")
            ray.requests.append((self.command, self.path, authorization))
            if ray.redirect:
                self.send_response(302)
                self.send_header("Location", ray.redirect)
                self.end_headers()
                return
            code, content = self.verdict(authorization) or ray.answer(self.command, self.path, body)
            text = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def verdict(self, authorization: str | None) -> tuple[int, str] | None:
            if ray.token is None or authorization == f"Bearer {ray.token}":
                return None
            return (403, "Forbidden") if authorization else (401, "Unauthorized")

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ray.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield ray
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
