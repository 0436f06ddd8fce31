"""Ray's dashboard over HTTP: what a run needs of its Jobs API, with the cluster's token.

Plain HTTP instead of Ray's own client, whose import takes longer than the rest of a submission.
"""

from __future__ import annotations

import ipaddress
import json
import os
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from orchestrator.cluster_config import ClusterConfig
from orchestrator.errors import ConfigError, OrchestratorError, TransientError, UserError, gist

TIMEOUT_S = 30.0
OLDEST = (2, 56)
"""Of Ray: older ones lack token authentication or what the driver uses of Ray Train."""
DENIED = (401, 403)
ADDRESS, TOKEN = "cluster.address", "cluster.token_file"
TOKENS_PLACE = "~/.ray/auth_token"


class RequestRefused(OrchestratorError):
    """The dashboard answered with an error; `status` is HTTP's."""

    def __init__(self, status: int, text: str):
        super().__init__(f"Ray's dashboard answered {status}: {text}")
        self.status, self.text = status, text


@dataclass(frozen=True, slots=True)
class Token:
    """A cluster's token and where it was found; the value never shows in a representation."""

    value: str
    source: str

    def __repr__(self) -> str:
        return f"Token({self.source})"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token elsewhere."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:  # fmt: skip
        return None


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A cluster that has been found fit to be spoken to."""

    address: str
    token: Token | None = None

    def version(self) -> dict[str, Any]:
        return self._json("GET", "/api/version")

    def jobs(self) -> list[dict[str, Any]]:
        """All submitted jobs, the oldest first."""
        found = [job for job in self._json("GET", "/api/jobs/") if job.get("submission_id")]
        return sorted(found, key=lambda job: (job.get("start_time") or 0, job["submission_id"]))

    def job(self, submission_id: str) -> dict[str, Any]:
        return self._json("GET", f"/api/jobs/{quote(submission_id, safe='')}")

    def submit(self, request: Mapping[str, Any]) -> str:
        return self._json("POST", "/api/jobs/", json.dumps(request).encode())["submission_id"]

    def stop(self, submission_id: str) -> None:
        self._json("POST", f"/api/jobs/{quote(submission_id, safe='')}/stop")

    def delete(self, submission_id: str) -> None:
        self._json("DELETE", f"/api/jobs/{quote(submission_id, safe='')}")

    def logs(self, submission_id: str) -> str:
        return self._json("GET", f"/api/jobs/{quote(submission_id, safe='')}/logs").get("logs") or ""

    def has_package(self, name: str) -> bool:
        try:
            self.send("GET", f"/api/packages/gcs/{name}")
        except RequestRefused as refused:
            if refused.status == 404:
                return False
            raise
        return True

    def upload(self, name: str, content: bytes) -> None:
        self.send("PUT", f"/api/packages/gcs/{name}", content)

    def follow(self, submission_id: str) -> Iterator[str]:
        """Pieces of the job's log from its start, until the job or the connection ends."""
        from orchestrator.cluster.ray.tail import tail

        url = f"{self.address}/api/jobs/{quote(submission_id, safe='')}/logs/tail"
        return tail(url, self._headers())

    def send(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """One request. Raises RequestRefused for an answer that is an error, TransientError where none comes."""
        request = urllib.request.Request(self.address + path, body, self._headers(), method=method)
        if body is not None:
            request.add_header("Content-Type", "application/json" if method == "POST" else "application/octet-stream")
        proxies = {} if is_loopback(urlsplit(self.address).hostname) else None
        opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler(proxies))
        try:
            with opener.open(request, timeout=TIMEOUT_S) as answer:
                return answer.read()
        except HTTPError as error:
            with error:
                raise RequestRefused(error.code, error.read(2000).decode(errors="replace").strip()) from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise TransientError(
                f"{ADDRESS} = {self.address}: nobody answers ({gist_of(reason)}). Way out: start the cluster "
                "(`ray start --head`), its port-forward or its tunnel, or give another address"
            ) from None

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token.value}"} if self.token else {}

    def _json(self, method: str, path: str, body: bytes | None = None) -> Any:
        answer = self.send(method, path, body)
        try:
            return json.loads(answer)
        except ValueError:
            raise _not_ray(self.address, "its answer is no JSON") from None


def connect(config: ClusterConfig, env: Mapping[str, str] = os.environ) -> Dashboard:
    """The cluster's dashboard, proved to be one that asks for a token, and ours to be right."""
    address = require_address(config.address, config.insecure)
    guarded = _asks_for_token(address)
    if not guarded and not config.insecure:
        rule = "this cluster answers without a token, so anybody who reaches it runs code there"
        way_out = "start it with RAY_AUTH_MODE=token on every node, or cluster.insecure=true"
        raise ConfigError(ADDRESS, address, rule, way_out)
    dashboard = Dashboard(address, read_token(config.token_file, env) if guarded else None)
    _require_version(dashboard)
    return dashboard


def require_address(address: str | None, insecure: bool) -> str:
    """The dashboard's base URL. Raises ConfigError where what is sent could be read on its way."""
    way_out = f"e.g. {ADDRESS}=http://127.0.0.1:8265"
    if address is None:
        raise ConfigError(ADDRESS, None, "is needed for cluster=ray", way_out)
    parts = urlsplit(address)
    try:
        ok = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        ok = False
    if not ok:
        raise ConfigError(ADDRESS, address, "must be the http(s) address of a dashboard", way_out)
    if "@" in parts.netloc or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.hostname}"
        raise ConfigError(ADDRESS, shown, "must hold no password, query or fragment", f"{way_out}, {TOKEN}=FILE")
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not insecure:
        rule = "is plain http to another machine, which would show token and code to everybody on the way"
        way_out = f"https, a tunnel (`ssh -L 8265:127.0.0.1:8265 HOST`) with {ADDRESS}=http://127.0.0.1:8265, "
        raise ConfigError(ADDRESS, address, rule, way_out + "or cluster.insecure=true")
    return address.rstrip("/")


def is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def read_token(file: str | None, env: Mapping[str, str]) -> Token:
    """The cluster's token from where Ray itself looks for it, after `cluster.token_file`."""
    if file is None and env.get("RAY_AUTH_TOKEN"):
        return Token(env["RAY_AUTH_TOKEN"].strip(), "RAY_AUTH_TOKEN")
    source = TOKEN if file else "RAY_AUTH_TOKEN_PATH" if env.get("RAY_AUTH_TOKEN_PATH") else TOKENS_PLACE
    path = Path(file or env.get("RAY_AUTH_TOKEN_PATH") or TOKENS_PLACE).expanduser()
    try:
        value = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        way_out = f"{TOKEN}=FILE with the token that the cluster was started with, or RAY_AUTH_TOKEN"
        raise ConfigError(TOKEN, file, f"the cluster asks for a token, and {path}: {reason}", way_out) from None
    if not value or not value.isprintable():
        raise ConfigError(TOKEN, file, f"{path} holds no token", "write the cluster's token into it")
    return Token(value, f"{source} ({path})" if source == TOKEN else source)


def _asks_for_token(address: str) -> bool:
    """Whether a request without a token is refused."""
    try:
        Dashboard(address).version()
    except RequestRefused as refused:
        if refused.status in DENIED:
            return True
        raise _not_ray(address, f"/api/version answers {refused.status}") from None
    return False


def _require_version(dashboard: Dashboard) -> None:
    try:
        version = str(dashboard.version()["ray_version"])
    except RequestRefused as refused:
        if refused.status not in DENIED or dashboard.token is None:
            raise _not_ray(dashboard.address, f"/api/version answers {refused.status}") from None
        rule = f"the cluster refuses the token from {dashboard.token.source}"
        raise ConfigError(TOKEN, None, rule, f"{TOKEN}=FILE with the token that the cluster was started with") from None
    except (KeyError, TypeError):
        raise _not_ray(dashboard.address, "/api/version names no Ray") from None
    if _numbers(version) < OLDEST:
        rule = f"runs Ray {version}, and this version needs {'.'.join(map(str, OLDEST))} or newer"
        raise ConfigError(ADDRESS, dashboard.address, rule, "update the cluster")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else 0 for part in version.split(".")[:2])


def _not_ray(address: str, why: str) -> UserError:
    return ConfigError(ADDRESS, address, f"is no Ray dashboard: {why}", "the address that `ray start` prints")


def gist_of(reason: object) -> str:
    return gist(reason) if isinstance(reason, Exception) else str(reason)
