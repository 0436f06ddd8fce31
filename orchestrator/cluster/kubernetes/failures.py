"""What the API server's refusals mean, with the way out and the exit code of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ConfigError, OrchestratorError, TransientError, UserError

RIGHT = re.compile(r"cannot (?P<verb>\w+) resource \"(?P<resource>[\w./-]+)\"")
"""In the words of Kubernetes' authorization, as opposed to an admission that refuses."""


class NotFound(UserError):
    """The server has no such object."""


class NotServed(UserError):
    """The server does not know the kind at all."""


class Conflict(UserError):
    """Another one was first: the object exists, or changed since it was read."""


class Forbidden(ConfigError):
    """The credentials lack a right."""

    @property
    def right(self) -> str:
        """``no right to VERB RESOURCE``."""
        return self.rule.removesuffix(" in it")


class Refused(UserError):
    """An admission (Pod Security, quota, a webhook) or the schema turned an object down."""


class Gone(OrchestratorError):
    """The version that a watch should go on from is no longer kept: list again."""


class Busy(TransientError):
    """The server cannot answer now; `after_s`: how long it asks to wait."""

    def __init__(self, message: str, after_s: float):
        self.after_s = after_s
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Call:
    """What was tried, for the words of an error."""

    verb: str
    """As in a Role: get, list, watch, create, patch, delete."""
    path: str
    namespace: str
    context: str
    server: str

    @property
    def what(self) -> str:
        """``jobs name`` or ``jobs``, after the namespace in the path."""
        words = re.sub(r"^/(api|apis/[^/]+)/[^/]+(/namespaces/[^/]+)?/?", "", self.path).split("/")
        return "/".join([words[0], *words[2:]]) + (f" {words[1]}" if len(words) > 1 else "")


def failure_of(call: Call, code: int, status: dict[str, Any], retry_after: str | None = None) -> OrchestratorError:
    """The error that a Status object of the server stands for; `status` is empty where the answer was none."""
    said = str(status.get("message") or f"status {code}")
    match code:
        case 401:
            return _unauthorized(call, said)
        case 403:
            return _forbidden(call, said)
        case 404:
            return _not_found(call, said, status.get("details") or {})
        case 409:
            return Conflict(f"{call.what}: {said}. Way out: look at it with `orchestrator status`, then try again")
        case 410:
            return Gone(said)
        case 429 | 500 | 502 | 503 | 504:
            message = (
                f"{call.server} cannot {call.verb} {call.what} now ({code}): {said}. Way out: try again in a while"
            )
            return Busy(message, float(retry_after or 0))
        case _:
            return _refused(call, said)


def unreachable(call: Call, error: Exception) -> OrchestratorError:
    """No answer at all."""
    said = _words(error)
    if "certificate" in said.lower() or "ssl" in said.lower():
        rule = f"{call.server} and this machine do not trust each other: {said}"
        return ConfigError("cluster.context", call.context, rule, "fetch the kubeconfig of the cluster anew")
    return TransientError(
        f"{call.server} (cluster.context = {call.context}) does not answer: {said.rpartition('] ')[2]}. "
        "Way out: check the network or the VPN, or name another cluster.context"
    )


def _words(error: Exception) -> str:
    """The last words of what may be a chain, such as ``HTTPConnection(...): Failed to ...: [Errno 111] refused``."""
    said = str(getattr(error, "reason", None) or error).strip().splitlines() or [type(error).__name__]
    return said[-1].rpartition(": ")[2].strip("')\" ") or type(error).__name__


def _unauthorized(call: Call, said: str) -> OrchestratorError:
    rule = f"{call.server} does not accept these credentials ({said}): expired, or of another cluster"
    way_out = f"log in again, then try: kubectl --context {call.context} auth whoami"
    return ConfigError("cluster.context", call.context, rule, way_out)


def _forbidden(call: Call, said: str) -> OrchestratorError:
    right = RIGHT.search(said)
    if right is None:
        return _refused(call, said)
    verb, resource = right["verb"], right["resource"]
    way_out = f"another namespace, or let its operator apply k8s/base or bind a role that may {verb} {resource}"
    return Forbidden("cluster.namespace", call.namespace, f"no right to {verb} {resource} in it", way_out)


def _not_found(call: Call, said: str, details: dict[str, Any]) -> OrchestratorError:
    if details.get("kind") == "namespaces":
        way_out = f"kubectl create namespace {call.namespace}, or name one that is there"
        return ConfigError("cluster.namespace", call.namespace, "the cluster has no such namespace", way_out)
    if not details.get("name"):
        return NotServed(f"{call.server} does not serve {call.path}. Way out: another cluster.kind, or its operator")
    return NotFound(f"{call.what}: {said}. Way out: orchestrator ls")


def _refused(call: Call, said: str) -> OrchestratorError:
    way_out = "change what it names"
    if "PodSecurity" in said:
        way_out = "a namespace that allows this (RDMA needs IPC_LOCK), or cluster.rdma=null"
    elif "exceeded quota" in said:
        way_out = "a smaller compute.num_processes or cluster.memory_gib_per_process, or more quota"
    return Refused(f"{call.what} is refused by the cluster: {said}. Way out: {way_out}")
