"""An API server that answers as the real one does, for the calls that the product makes; over real sockets."""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

PATH = re.compile(
    r"(?P<root>/api/[^/]+|/apis/[^/]+/[^/]+)(/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[^/]+)(/(?P<name>[^/]+))?(/(?P<part>[^/]+))?"
)
SERVED = {
    "/api/v1": ["pods", "configmaps", "services", "events", "secrets", "persistentvolumeclaims", "serviceaccounts"],
    "/apis/batch/v1": ["jobs"],
    "/apis/jobset.x-k8s.io/v1alpha2": ["jobsets"],
    "/apis/trainer.kubeflow.org/v1alpha1": ["trainjobs", "trainingruntimes"],
    "/apis/networking.k8s.io/v1": ["networkpolicies"],
    "/apis/ray.io/v1": ["rayjobs"],
    "/apis/kueue.x-k8s.io/v1beta1": ["localqueues", "workloads", "workloadpriorityclasses"],
    "/apis/scheduling.k8s.io/v1": ["priorityclasses"],
    "/apis/authorization.k8s.io/v1": ["selfsubjectaccessreviews"],
}
TOKEN = "a-good-token"
Object = dict[str, Any]


class Refusal(Exception):
    """An answer of the form Status."""

    def __init__(self, code: int, reason: str, message: str, **details: Any):
        self.status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
                       "message": message, "details": details}  # fmt: skip
        super().__init__(message)


class Log:
    """What a container printed; `rotate` forgets, as the file of a node does."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.ended = False
        self.first = 0
        """Lines before this one are in rotated files, which only a stream that was open may still have read."""

    def write(self, *texts: str) -> None:
        for text in texts:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "123Z")
            self.lines.append((now, text))

    def end(self) -> None:
        self.ended = True

    def rotate(self) -> None:
        self.first = len(self.lines)


class FakeApi:
    """Objects by path; tests read and change `objects`, `denied`, `faults` and `logs` directly."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str, str], Object] = {}
        self.served = copy.deepcopy(SERVED)
        self.namespaces = {"default"}
        self.denied: set[tuple[str, str]] = set()
        """(verb, resource) that the credentials may not."""
        self.admission: list[Callable[[str, Object], str | None]] = []
        """Each may say why an object that is created is turned down."""
        self.warnings: list[str] = []
        self.faults: list[tuple[str, int | str]] = []
        """(method, code | "reset") that the next call with this method meets."""
        self.lost: list[str] = []
        """Calls whose next one is carried out without an answer."""
        self.cut_logs: list[int] = []
        """Lines after which the next streams of logs break off."""
        self.logs: dict[str, Log] = {}
        self.calls: list[tuple[str, str]] = []
        self.accepted: list[str] = []
        """The header Accept of each call."""
        self.queries: list[str] = []
        """What followed the path of each call."""
        self.after: list[Callable[[str, Object], None]] = []
        """Controllers: called with (ADDED | MODIFIED | DELETED, object) after each change."""
        self.oldest = 0
        """Watches from before this version are answered with 410."""
        self._version = itertools.count(1)
        self.version = 0
        self.history: list[tuple[int, str, tuple[str, str, str, str], Object]] = []
        self.changed = threading.Condition(threading.RLock())
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.open: set[socket.socket] = set()
        self.down = False
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.down = True
        self.break_off()
        self._server.shutdown()
        self._server.server_close()

    def break_off(self) -> None:
        """Cut every open connection, as a server does that dies."""
        for one in list(self.open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    # What tests put there.

    def put(self, root: str, plural: str, obj: Object, namespace: str = "default") -> Object:
        """Add or replace an object without being asked for rights."""
        obj = copy.deepcopy(obj)
        obj["metadata"].setdefault("namespace", namespace)
        key = (root, namespace, plural, obj["metadata"]["name"])
        return self._store("MODIFIED" if key in self.objects else "ADDED", key, obj)

    def change(self, root: str, plural: str, name: str, **parts: Any) -> Object:
        """Merge top-level parts (status, spec, metadata) into an object."""
        key = (root, "default", plural, name)
        with self.changed:
            return self._store("MODIFIED", key, merge(self.objects[key], parts))

    def remove(self, root: str, plural: str, name: str, namespace: str = "default") -> None:
        with self.changed:
            self._delete((root, namespace, plural, name))

    def names(self, plural: str) -> list[str]:
        return sorted(key[3] for key in self.objects if key[2] == plural)

    def log(self, pod: str) -> Log:
        return self.logs.setdefault(pod, Log())

    # What the server does.

    def _store(self, kind: str, key: tuple[str, str, str, str], obj: Object) -> Object:
        with self.changed:
            self.version = next(self._version)
            obj["metadata"]["resourceVersion"] = str(self.version)
            obj["metadata"].setdefault("uid", str(uuid.uuid4()))
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            obj["metadata"].setdefault("creationTimestamp", now)
            self.objects[key] = obj
            self.history.append((self.version, kind, key, copy.deepcopy(obj)))
            self.changed.notify_all()
        self._tell(kind, obj)
        return obj

    def _tell(self, kind: str, obj: Object) -> None:
        for controller in self.after:
            controller(kind, obj)

    def _delete(self, key: tuple[str, str, str, str]) -> Object:
        obj = self.objects.pop(key)
        self.version = next(self._version)
        self.history.append((self.version, "DELETED", key, copy.deepcopy(obj)))
        self.changed.notify_all()
        uid = obj["metadata"]["uid"]
        for other, owned in list(self.objects.items()):  # the garbage collector
            if any(owner["uid"] == uid for owner in owned["metadata"].get("ownerReferences", ())):
                self._delete(other)
        self._tell("DELETED", obj)
        return obj

    def answer(self, method: str, found: dict[str, str], query: dict[str, str], body: Object | None) -> Object:
        root, plural, name = found["root"], found["plural"], found["name"]
        if plural == "selfsubjectaccessreviews":
            asked = (body or {})["spec"]["resourceAttributes"]
            return {"status": {"allowed": (asked["verb"], asked["resource"]) not in self.denied}}
        key = (root, found["namespace"] or "", plural, name or "")
        if found["namespace"] and found["namespace"] not in self.namespaces and method == "POST":
            raise Refusal(404, "NotFound", f'namespaces "{found["namespace"]}" not found', kind="namespaces",
                          name=found["namespace"])  # fmt: skip
        with self.changed:
            match method:
                case "GET" if not name:
                    return self._page(key, query)
                case "POST":
                    return self._create(key, body or {}, query)
            if key not in self.objects:
                raise Refusal(404, "NotFound", f'{plural} "{name}" not found', name=name, kind=plural)
            match method:
                case "GET":
                    return self.objects[key]
                case "PATCH":
                    return self._store("MODIFIED", key, merge(self.objects[key], body or {}))
            uid = ((body or {}).get("preconditions") or {}).get("uid")
            if uid not in (None, self.objects[key]["metadata"]["uid"]):
                raise Refusal(409, "Conflict", f"Precondition failed: UID in precondition: {uid}", name=name)
            return self._delete(key)

    def _create(self, key: tuple[str, str, str, str], body: Object, query: dict[str, str]) -> Object:
        name = body["metadata"]["name"]
        for judge in self.admission:
            said = judge("create", body)
            if said:
                raise Refusal(403, "Forbidden", f'{key[2]} "{name}" is forbidden: {said}', name=name)
        if (*key[:3], name) in self.objects:
            raise Refusal(409, "AlreadyExists", f'{key[2]} "{name}" already exists', name=name)
        body["metadata"]["namespace"] = key[1]
        return self._store("ADDED", (*key[:3], name), body)

    def _page(self, key: tuple[str, str, str, str], query: dict[str, str]) -> Object:
        found = [obj for at, obj in sorted(self.objects.items()) if at[:3] == key[:3] and selects(query, obj)]
        start, limit = int(query.get("continue", "0")), int(query.get("limit", "1000"))
        more = {"continue": str(start + limit)} if start + limit < len(found) else {}
        return {"kind": "List", "items": found[start : start + limit],
                "metadata": {"resourceVersion": str(self.version), **more}}  # fmt: skip


def merge(obj: Object, change: Object) -> Object:
    """RFC 7396."""
    merged = copy.deepcopy(obj)
    for name, value in change.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            merged[name] = merge(merged.get(name) or {}, value)
        else:
            merged[name] = value
    return merged


def selects(query: dict[str, str], obj: Object) -> bool:
    """Whether label and field selectors of the forms a=b and a take an object."""
    labels = obj["metadata"].get("labels", {})
    for word in filter(None, query.get("labelSelector", "").split(",")):
        name, equals, value = word.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    for word in filter(None, query.get("fieldSelector", "").split(",")):
        name, _, value = word.partition("=")
        at: Any = obj
        for part in name.split("."):
            at = (at or {}).get(part)
        if at != value:
            return False
    return True


def write_kubeconfig(path: Path, url: str, token: str = TOKEN) -> None:
    """JSON is YAML."""
    one = {"name": "test", "context": {"cluster": "test", "user": "ada"}}
    other = {"name": "staging", "context": {"cluster": "test", "user": "ada", "namespace": "vision"}}
    content = {
        "apiVersion": "v1", "kind": "Config", "current-context": "test", "contexts": [one, other],
        "clusters": [{"name": "test", "cluster": {"server": url}}],
        "users": [{"name": "ada", "user": {"token": token}}],
    }  # fmt: skip
    path.write_text(json.dumps(content))


def _handler(api: FakeApi) -> type[BaseHTTPRequestHandler]:  # noqa: C901
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
            if (verb, resource) in api.denied:
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
