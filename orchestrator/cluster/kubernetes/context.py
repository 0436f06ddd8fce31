"""Which cluster and namespace: a context of the kubeconfig, or the service account of the pod that this runs in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, gist, nearest

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds the token and the namespace of its service account."""


def client_of(context: str | None, namespace: str | None) -> tuple[Any, str, str]:
    """The official client, the namespace and the name of the context. Raises ConfigError where there is none."""
    from kubernetes import client

    settings = client.Configuration()
    settings.retries = False  # `Api` repeats what may be repeated
    settings.connection_pool_maxsize = 64  # one connection for each pod whose log is followed
    path = os.environ.get("KUBECONFIG") or "~/.kube/config"
    if context is None and not _exists(path) and (ACCOUNT / "token").exists():
        own = _load_account(settings)
        name = "the pod's service account"
    else:
        own, name = _load_context(settings, path, context)
    return client.ApiClient(settings), namespace or own or "default", name


def _exists(paths: str) -> bool:
    return any(Path(path).expanduser().is_file() for path in paths.split(os.pathsep) if path)


def _load_account(settings: Any) -> str | None:
    from kubernetes import config

    config.load_incluster_config(settings)
    found = ACCOUNT / "namespace"
    return found.read_text().strip() if found.exists() else None


def _load_context(settings: Any, path: str, context: str | None) -> tuple[str | None, str]:
    """Load one context of a kubeconfig; returns its namespace and name."""
    from kubernetes import config

    if not _exists(path):
        way_out = "set KUBECONFIG or write ~/.kube/config (your cluster's operator or `kind get kubeconfig` gives one)"
        raise ConfigError("cluster.context", context, f"there is no kubeconfig at {path}", way_out)
    try:
        listed: Any = config.list_kube_config_contexts(path)
        contexts, active = listed
        name = _chosen(contexts, active, context)
        config.load_kube_config(path, name, settings, persist_config=False)
    except ConfigError:
        raise
    except Exception as error:  # broken YAML, a missing user, a certificate that is no file: many types
        way_out = f"mend {path}, or name a context that works"
        raise ConfigError("cluster.context", context, f"the kubeconfig is unusable: {gist(error)}", way_out) from error
    chosen = next(one for one in contexts if one["name"] == name)
    return chosen["context"].get("namespace"), name


def _chosen(contexts: Sequence[dict[str, Any]], active: dict[str, Any] | None, context: str | None) -> str:
    names = [one["name"] for one in contexts]
    if context is not None and context not in names:
        raise ConfigError("cluster.context", context, "the kubeconfig has no such context", nearest(context, names))
    if context is None and active is None:
        raise ConfigError("cluster.context", None, "the kubeconfig has no current context", nearest("", names))
    return context or str((active or {})["name"])
