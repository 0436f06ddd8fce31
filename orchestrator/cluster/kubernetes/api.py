"""A thin shell over the official client: JSON in, JSON out, every failure named with its way out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from orchestrator.cluster.kubernetes.context import client_of
from orchestrator.cluster.kubernetes.failures import Busy, Call, Conflict, NotFound, NotServed, failure_of, unreachable
from orchestrator.cluster.kubernetes.resources import Resource, resource_of
from orchestrator.errors import TransientError

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
SILENCE_S = 30.0
"""Between two pieces of an answer."""
PAUSES_S = (0.2, 0.5, 1.0, 2.0)
"""Before each repetition of a call that the server could not answer."""
WATCH_S = 240
"""After which the server ends a watch; the next one goes on from where it was."""
PAGE = 500
JSON = "application/json"
METADATA = f"{JSON};as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
MERGE_PATCH = "application/merge-patch+json"
VERBS = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}
Object = dict[str, Any]


def connect(context: str | None = None, namespace: str | None = None) -> Api:
    """The API of `cluster.context` and `cluster.namespace`; nothing is sent yet."""
    return Api(*client_of(context, namespace))


@dataclass(frozen=True, slots=True)
class Request:
    """One call."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Object | None = None
    accept: str = JSON
    silence_s: float | None = None
    """Given: the answer is a stream, which is read later and may be silent for so long."""


class Stream:
    """Lines of an answer that goes on; `close` ends it, from another thread too."""

    def __init__(self, answer: Any, call: Call):
        self._answer = answer
        self._call = call
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        """Whole lines as they come. Raises TransientError where the connection breaks."""
        import urllib3

        rest = b""
        try:
            for chunk in self._answer.stream(1 << 16):
                *whole, rest = (rest + chunk).split(b"\n")
                yield from whole
            if rest:
                yield rest
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if not self._closed:
                raise unreachable(self._call, error) from error
        finally:
            self._answer.close()

    def close(self) -> None:
        """Wake up whoever waits for the next line."""
        self._closed = True
        with suppress(ValueError, RuntimeError, OSError):  # it has ended already
            self._answer.shutdown()


class Api:
    """One namespace of one cluster; its methods raise the errors of `failures`."""

    def __init__(self, client: Any, namespace: str, context: str):
        from kubernetes.client import ApiException

        self._client = client
        self._broken = ApiException  # in which the client wraps errors of TLS
        self.namespace = namespace
        self.context = context

    @property
    def server(self) -> str:
        return str(self._client.configuration.host)

    def get(self, resource: Resource, name: str, metadata_only: bool = False) -> Object:
        """`metadata_only`: without what a secret holds."""
        accept = METADATA if metadata_only else JSON
        return self.call(Request("GET", resource.path(self.namespace, name), accept=accept))

    def find(self, resource: Resource, name: str, metadata_only: bool = False) -> Object | None:
        """The same, or None where there is none."""
        try:
            return self.get(resource, name, metadata_only)
        except NotFound:
            return None

    def list(self, resource: Resource, labels: str = "", fields: str = "") -> tuple[list[Object], str]:
        """All objects with these labels, and the version from which a watch goes on."""
        query = {"labelSelector": labels, "fieldSelector": fields, "limit": str(PAGE)}
        items: list[Object] = []
        while True:
            page = self.call(Request("GET", resource.path(self.namespace), query))
            items += page["items"]
            query["continue"] = page["metadata"].get("continue", "")
            if not query["continue"]:
                return items, page["metadata"]["resourceVersion"]

    def create(self, obj: Object) -> tuple[Object, list[str]]:
        """The object as the server keeps it, and what the server warned of."""
        answer = self._answered(Request("POST", resource_of(obj).path(self.namespace), body=obj))
        warnings = [text.partition('"')[2].rstrip('"') for text in answer.headers.getlist("Warning")]
        return json.loads(answer.data), warnings

    def rehearse(self, obj: Object) -> None:
        """Raises what would keep an object from being created; one that is there already is no hindrance."""
        with suppress(Conflict):
            self.call(Request("POST", resource_of(obj).path(self.namespace), {"dryRun": "All"}, obj))

    def patch(self, resource: Resource, name: str, change: Object, rehearsal: bool = False) -> Object:
        """Merge `change` into an object; None removes a key. `rehearsal`: only find out whether that is possible."""
        query = {"dryRun": "All"} if rehearsal else {}
        return self.call(Request("PATCH", resource.path(self.namespace, name), query, change))

    def delete(self, resource: Resource, name: str, grace_s: int | None = None, uid: str | None = None) -> bool:
        """With all that it owns; returns whether it was there. `uid`: only that very object."""
        body: Object = {"propagationPolicy": "Background"}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        try:
            self.call(Request("DELETE", resource.path(self.namespace, name), body=body))
        except NotFound:
            return False
        return True

    def serves(self, resource: Resource) -> bool:
        """Whether the cluster knows this very version of the kind."""
        try:
            found = self.call(Request("GET", resource.root))["resources"]
        except NotServed:
            return False
        return any(one["name"] == resource.plural for one in found)

    def watch(self, resource: Resource, labels: str, version: str) -> Stream:
        """Changes since `version`, one JSON each, until the server ends it; read them with `read_event`."""
        query = {
            "watch": "true",
            "labelSelector": labels,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_S),
        }
        return self.stream(resource.path(self.namespace), query, WATCH_S + 30.0)

    def read_event(self, line: bytes) -> tuple[str, Object]:
        """(ADDED | MODIFIED | DELETED | BOOKMARK, object) of a line of a watch. Raises Gone: list again."""
        event = json.loads(line)
        if event["type"] == "ERROR":
            raise failure_of(self._named(Request("GET", "/watch")), event["object"]["code"], event["object"])
        return event["type"], event["object"]

    def stream(self, path: str, query: Mapping[str, str], silence_s: float, patient: bool = True) -> Stream:
        """Lines of an answer; more than `silence_s` without one counts as a broken connection.

        `patient`: ask again where the server cannot answer.
        """
        request = Request("GET", path, query, accept="*/*", silence_s=silence_s)
        return Stream((self._answered if patient else self._once)(request), self._named(request))

    def call(self, request: Request) -> Object:
        """One call, repeated while the server cannot answer."""
        return json.loads(self._answered(request).data)

    def _answered(self, request: Request) -> Any:
        """The response of a call that went well. Raises what the last repetition met."""
        for pause_s in (*PAUSES_S, None):
            try:
                return self._once(request)
            except TransientError as error:
                if pause_s is None:
                    raise
                wait_s = max(pause_s, error.after_s if isinstance(error, Busy) else 0.0)
                logger.debug("%s; again in %.1f s", error, wait_s)
                time.sleep(wait_s)
        raise AssertionError("the last repetition returns or raises")

    def _once(self, request: Request) -> Any:
        import urllib3

        called = self._named(request)
        headers = {"Accept": request.accept}
        if request.body is not None:
            headers["Content-Type"] = MERGE_PATCH if request.method == "PATCH" else JSON
        sent = self._client.param_serialize(
            request.method, request.path, query_params=[(k, v) for k, v in request.query.items() if v],
            header_params=headers, body=request.body, auth_settings=["BearerToken"],
        )  # fmt: skip
        try:
            timeout = (CONNECT_S, request.silence_s or SILENCE_S)
            answer = self._client.call_api(*sent, _request_timeout=timeout).response
            if answer.status >= 400 or request.silence_s is None:
                answer.read(cache_content=True)
        except (urllib3.exceptions.HTTPError, OSError, self._broken) as error:
            raise unreachable(called, error) from error
        if answer.status >= 400:
            raise failure_of(called, answer.status, _status(answer.data), answer.headers.get("Retry-After"))
        return answer

    def _named(self, request: Request) -> Call:
        verb = VERBS.get(request.method, "watch" if "watch" in request.query else "get")
        return Call(verb, request.path, self.namespace, self.context, self.server)


def _status(data: bytes) -> Object:
    """The Status object that refusals come with, or nothing where something else answered."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.get("kind") == "Status" else {}
