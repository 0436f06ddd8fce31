"""Secrets by reference: where one is, and its value for the process in need at the moment of need."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import ConfigError
from orchestrator.redact import find_secrets, remember

SECRETS_FOLDER = "/etc/orchestrator/secrets"
"""Where a pod finds its secrets as files, each in the folder of its purpose."""
REFERENCE = re.compile(r"(?P<name>[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)/(?P<key>[-._a-zA-Z0-9]{1,253})")
FORM = "NAME/KEY of a Kubernetes secret, or the absolute path of a file"
KEYS = {"tracking": "tracking.secret", "store": "cluster.store_secret"}
"""The dotted key of each purpose."""
LARGEST = 64 << 10
_FOR_STORES: list[str] = []


def parse_reference(purpose: str, reference: str) -> tuple[str, str] | None:
    """(name, key) of a Kubernetes secret, None for the path of a file. Raises ConfigError for what is neither."""
    if reference.startswith("/"):
        return None
    found = REFERENCE.fullmatch(reference)
    if found is None:
        # a value that is no reference may be the secret itself, so it is not shown
        raise ConfigError(KEYS[purpose], "(hidden)", f"must be the {FORM}", f"e.g. {KEYS[purpose]}=wandb/api-key")
    return found["name"], found["key"]


def path_of(purpose: str, reference: str) -> Path:
    """The file that holds the secret where the run is."""
    named = parse_reference(purpose, reference)
    return Path(SECRETS_FOLDER, purpose, named[1]) if named else Path(reference)


def read_secret(purpose: str, reference: str) -> str:
    """The value, without the white space around it. Raises ConfigError that names the file and what ails it."""
    path = path_of(purpose, reference)
    value = _read(purpose, reference, path).strip()
    if not value:
        raise ConfigError(KEYS[purpose], reference, f"names {path}, which is empty", "write the secret into it")
    remember(value)
    return value


def read_pairs(purpose: str, reference: str) -> dict[str, str]:
    """Lines NAME=VALUE; empty ones and those that begin with # are left out."""
    path = path_of(purpose, reference)
    pairs = {}
    for number, line in enumerate(read_secret(purpose, reference).splitlines(), start=1):
        name, equals, value = line.strip().partition("=")
        if not name or name.startswith("#"):
            continue
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            rule = f"names {path}, whose line {number} is not NAME=VALUE"
            raise ConfigError(KEYS[purpose], reference, rule, "lines such as AWS_ACCESS_KEY_ID=...")
        remember(value)
        pairs[name] = value
    return pairs


def require_secret(purpose: str, reference: str) -> None:
    """Refuse a file that could not be read later, without reading it."""
    with _opened(purpose, reference, path_of(purpose, reference)):
        pass


def use_for_stores(reference: str | None) -> None:
    """Object stores are opened with these keys by this process and those that it forks from now on."""
    _FOR_STORES[:] = [reference] if reference else []


def store_keys() -> dict[str, str]:
    """The keys of the object store; none where they are left to the environment."""
    return read_pairs("store", _FOR_STORES[0]) if _FOR_STORES else {}


def require_no_secrets(config: Mapping[str, Any]) -> None:
    """Refuse a config that holds a secret: whoever may read run.json or the objects of a job would read it."""
    for key, value in _texts(config):
        kind = next((kind for kind, _, _ in find_secrets(f"{key}={value}")), None)
        if kind is not None:
            rule = f"holds a {kind}, which everybody who may read the run would see"
            way_out = "a .netrc file for http; cluster.store_secret or tracking.secret say where other secrets are"
            raise ConfigError(key, "(hidden)", rule, way_out)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value


def _read(purpose: str, reference: str, path: Path) -> str:
    with _opened(purpose, reference, path) as file:
        content = file.read(LARGEST)
    try:
        return content.decode()
    except UnicodeDecodeError:
        rule = f"names {path}, which is no text"
        raise ConfigError(KEYS[purpose], reference, rule, "write the secret into it") from None


@contextmanager
def _opened(purpose: str, reference: str, path: Path) -> Iterator[IO[bytes]]:
    key = KEYS[purpose]
    try:
        with open(path, "rb") as file:
            _require_private(key, reference, path, os.fstat(file.fileno()))
            yield file
    except OSError as error:
        rule = f"names {path}, which cannot be read ({error.strerror})"
        raise ConfigError(key, reference, rule, _way_out(reference, path)) from None


def _require_private(key: str, reference: str, path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(key, reference, f"names {path}, which is no file", "name the file itself")
    if status.st_mode & stat.S_IROTH:
        rule = f"names {path}, which every user of the machine may read (mode {stat.S_IMODE(status.st_mode):04o})"
        raise ConfigError(key, reference, rule, f"chmod 600 {path}")


def _way_out(reference: str, path: Path) -> str:
    if reference.startswith("/"):
        return f"put it there, readable for this user alone: install -m 600 /dev/stdin {path}"
    name, _, named = reference.partition("/")
    return f"on Kubernetes: kubectl create secret generic {name} --from-file={named}=FILE; elsewhere: a file's path"
