"""An API server that answers as the real one does, for the calls that the product makes; over real sockets."""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

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
        """(verb, resource) that the credentials may not; `pods of all`: only in all namespaces at once."""
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
        self.lost_pods: set[str] = set()
        """Those whose node does not answer."""
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
        from fake_http import handler_of  # which imports this module

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
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
                case "PATCH" if "dryRun" in query:
                    return merge(self.objects[key], body or {})
                case "PATCH":
                    return self._store("MODIFIED", key, noted(merge(self.objects[key], body or {}), body or {}))
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
        if "dryRun" in query:
            return body
        body["metadata"]["namespace"] = key[1]
        return self._store("ADDED", (*key[:3], name), body)

    def _page(self, key: tuple[str, str, str, str], query: dict[str, str]) -> Object:
        root, space, plural, _ = key
        found = [obj for at, obj in sorted(self.objects.items())
                 if (at[0], at[2]) == (root, plural) and space in ("", at[1]) and selects(query, obj)]  # fmt: skip
        start, limit = int(query.get("continue", "0")), int(query.get("limit", "1000"))
        more = {"continue": str(start + limit)} if start + limit < len(found) else {}
        return {"kind": "List", "items": found[start : start + limit],
                "metadata": {"resourceVersion": str(self.version), **more}}  # fmt: skip


def noted(obj: Object, change: Object) -> Object:
    """As controllers of runs leave it that was just suspended, or let go."""
    suspend = (change.get("spec") or {}).get("suspend")
    if suspend is None:
        return obj
    status = obj.get("status") or {}
    others = [one for one in status.get("conditions") or [] if one["type"] != "Suspended"]
    said = {"type": "Suspended", "status": str(suspend), "reason": "", "message": ""}
    return {**obj, "status": {**status, "conditions": [*others, said]}}


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
