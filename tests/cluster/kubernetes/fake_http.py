"""The HTTP side of the fake API server: rights, faults, watches and logs, over real sockets."""

from __future__ import annotations

import json
import re
import socket
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fake_api import TOKEN, FakeApi, Object, Refusal, selects

PATH = re.compile(
    r"(?P<root>/api/[^/]+|/apis/[^/]+/[^/]+)(/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[^/]+)(/(?P<name>[^/]+))?(/(?P<part>[^/]+))?"
)


def handler_of(api: FakeApi) -> type[BaseHTTPRequestHandler]:  # noqa: C901
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def setup(self) -> None:
            super().setup()
            api.open.add(self.connection)

        def finish(self) -> None:
            api.open.discard(self.connection)
            with suppress(OSError):
                super().finish()

        def handle(self) -> None:
            with suppress(OSError):  # a client that went away
                super().handle()

        def do(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            api.calls.append((self.command, url.path))
            api.queries.append(url.query)
            api.accepted.append(self.headers.get("Accept", ""))
            try:
                if self._faulty():
                    return
                self._judge(url.path, query, json.loads(body) if body else None)
            except Refusal as refusal:
                self._send(refusal.status["code"], refusal.status)

        do_GET = do_POST = do_PATCH = do_DELETE = do

        def _faulty(self) -> bool:
            fault = next((one for one in api.faults if one[0] in (self.command, self.command + " " + self.path)), None)
            if fault is None and not api.down:
                return False
            if fault is not None:
                api.faults.remove(fault)
            if fault is None or fault[1] == "reset":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return True
            raise Refusal(int(fault[1]), "Fault", "the server is currently unable to handle the request")

        def _judge(self, path: str, query: dict[str, str], body: Object | None) -> None:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refusal(401, "Unauthorized", "Unauthorized")
            if path in api.served:
                self._send(200, {"resources": [{"name": name} for name in api.served[path]]})
                return
            match = PATH.fullmatch(path)
            if match is None or match["plural"] not in api.served.get(match["root"], ()):
                self.send_response(404)
                self.send_header("Content-Length", "19")
                self.end_headers()
                self.wfile.write(b"404 page not found\n")
                return
            found = match.groupdict()
            self._authorize(found, query)
            if found["part"] == "log" and found["name"] in api.lost_pods:
                said = "dial tcp 10.0.0.1:10250: connect: connection refused"
                raise Refusal(500, "InternalError", f'Get "https://10.0.0.1:10250/containerLogs": {said}')
            if found["part"] == "log":
                self._log(found["name"] or "", query)
            elif query.get("watch") == "true":
                self._watch(found, query)
            else:
                answer = api.answer(self.command, found, query, body)
                if f"{self.command} {path}" in api.lost:
                    api.lost.remove(f"{self.command} {path}")
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self._send(201 if self.command == "POST" else 200, answer)

        def _authorize(self, found: dict[str, Any], query: dict[str, str]) -> None:
            verb = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}.get(self.command, "get")
            if verb == "get" and not found["name"]:
                verb = "watch" if query.get("watch") else "list"
            resource = found["plural"] + (f"/{found['part']}" if found["part"] else "")
            wide = found["namespace"] is None and (verb, f"{resource} of all") in api.denied
            if wide or (verb, resource) in api.denied:
                group = found["root"].split("/")[2] if found["root"].startswith("/apis") else ""
                said = (f'{resource} is forbidden: User "ada" cannot {verb} resource "{resource}" '
                        f'in API group "{group}" in the namespace "{found["namespace"]}"')  # fmt: skip
                raise Refusal(403, "Forbidden", said, kind=resource)

        def _send(self, code: int, answer: Object) -> None:
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for text in api.warnings if self.command == "POST" else ():
                self.send_header("Warning", f'299 - "{text}"')
            self.end_headers()
            self.wfile.write(data)

        def _begin(self) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def _watch(self, found: dict[str, Any], query: dict[str, str]) -> None:
            at, until = int(query["resourceVersion"]), time.monotonic() + float(query["timeoutSeconds"])
            self._begin()
            if at < api.oldest:
                gone = Refusal(410, "Expired", f"too old resource version: {at} ({api.oldest})").status
                self._chunk(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
                self._chunk(b"")
                return
            while time.monotonic() < until and not api.down:
                with api.changed:
                    news = [one for one in api.history if one[0] > at]
                    if not news:
                        api.changed.wait(0.05)
                for version, kind, key, obj in news:
                    at = version
                    if key[0] == found["root"] and key[2] == found["plural"] and selects(query, obj):
                        self._chunk(json.dumps({"type": kind, "object": obj}).encode() + b"\n")
            self._chunk(b"")

        def _log(self, pod: str, query: dict[str, str]) -> None:
            if not any(key[2] == "pods" and key[3] == pod for key in api.objects):
                raise Refusal(404, "NotFound", f'pods "{pod}" not found', name=pod, kind="pods")
            log = api.log(pod)
            cut = api.cut_logs.pop(0) if api.cut_logs else None
            since = query.get("sinceTime", "")[:19]
            tail = int(query["tailLines"]) if "tailLines" in query else None
            at = log.first if tail is None else max(len(log.lines) - tail, log.first)
            self._begin()
            while True:
                lines = log.lines[at:] if cut is None else log.lines[at : at + cut]
                wanted = [(t, text) for t, text in lines if t[:19] >= since]
                data = "".join(
                    f"{t} {text}\n" if query.get("timestamps") else f"{text}\n" for t, text in wanted
                ).encode()
                at += len(lines)
                if data:
                    self._chunk(data)
                if cut is not None and len(lines) >= cut:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if not query.get("follow") or (log.ended and at >= len(log.lines)) or api.down:
                    break
                time.sleep(0.005)
            self._chunk(b"")

    return Handler
