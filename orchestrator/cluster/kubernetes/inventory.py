"""Reads what a snapshot of a cluster holds: all kinds at once, each bounded, and what may not be read is said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from orchestrator.cluster.kubernetes.api import METADATA, Api, Request
from orchestrator.cluster.kubernetes.failures import Forbidden, NotServed
from orchestrator.cluster.kubernetes.pods import event_time
from orchestrator.cluster.kubernetes.resources import (
    ACCOUNT,
    CLAIM,
    CONFIG_MAP,
    EVENT,
    KINDS,
    POD,
    PRIORITY,
    QUEUE,
    QUEUE_PRIORITY,
    SECRET,
    SERVICE,
    WORKLOAD,
    Resource,
)  # fmt: skip
from orchestrator.cluster.kubernetes.trimmed import trimmed
from orchestrator.errors import OrchestratorError

Object = dict[str, Any]
PAGE = 500
MOST = 10_000
"""Objects of one kind."""
MOST_EVENTS = 2_000
DEADLINE_S = 45.0
"""For all kinds together: what has not answered by then is not in the snapshot."""
METADATA_LIST = METADATA.replace("PartialObjectMetadata", "PartialObjectMetadataList")

NODE = Resource("v1", "nodes", "Node", namespaced=False)
NAMESPACE = Resource("v1", "namespaces", "Namespace", namespaced=False)
RESOURCE_QUOTA = Resource("v1", "resourcequotas", "ResourceQuota")
LIMIT_RANGE = Resource("v1", "limitranges", "LimitRange")
STORAGE_CLASS = Resource("storage.k8s.io/v1", "storageclasses", "StorageClass", namespaced=False)
RAY_CLUSTER = Resource("ray.io/v1", "rayclusters", "RayCluster")
CLUSTER_QUEUE = Resource("kueue.x-k8s.io/v1beta1", "clusterqueues", "ClusterQueue", namespaced=False)
RIGHTS = Resource("authorization.k8s.io/v1", "selfsubjectrulesreviews", "SelfSubjectRulesReview", namespaced=False)
FLAVOR = Resource("kueue.x-k8s.io/v1beta1", "resourceflavors", "ResourceFlavor", namespaced=False)

LISTED = (
    *KINDS.values(), RAY_CLUSTER, EVENT, QUEUE, RESOURCE_QUOTA, LIMIT_RANGE, CLAIM, SERVICE, CONFIG_MAP, SECRET,
    ACCOUNT, NODE, CLUSTER_QUEUE, FLAVOR, PRIORITY, QUEUE_PRIORITY, STORAGE_CLASS,
)  # fmt: skip
EVERYWHERE = (POD, WORKLOAD)
"""Read in all namespaces where the rights go so far: nodes and queues are shared with other namespaces."""
NAMES_ONLY = (CONFIG_MAP, SECRET)


@dataclass(slots=True)
class Inventory:
    """What could be read, by kind."""

    objects: dict[str, list[Object]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    limits: dict[str, str] = field(default_factory=dict)


def read_inventory(api: Api, names: Mapping[Resource, Iterable[str]], is_ours: Callable[[Object], bool]) -> Inventory:
    """`names`: what the run refers to by name, asked for one by one where its kind may not be listed."""
    found = Inventory()
    works = [partial(_list_here, api, one, names, found) for one in LISTED]
    works += [partial(_list_everywhere, api, one, found) for one in EVERYWHERE]
    works += [partial(_read_namespace, api, found), partial(_read_rights, api, found)]
    kinds = [*(one.kind for one in (*LISTED, *EVERYWHERE)), NAMESPACE.kind, RIGHTS.kind]
    _at_once(works, DEADLINE_S)
    for kind in kinds:
        if kind not in found.objects:  # and nothing says why
            found.missing.setdefault(kind, f"no answer within {DEADLINE_S:g} s")
    read = dict(found.objects)  # a late thread may still add to the others
    if NODE.kind in read:
        read[NODE.kind] = _with_images_once(read[NODE.kind])
    objects = {kind: [trimmed(one, kind, is_ours(one)) for one in every] for kind, every in read.items()}
    return Inventory(
        objects, {kind: why for kind, why in found.missing.items() if kind not in read}, dict(found.limits)
    )


def _at_once(works: Sequence[Callable[[], object]], limit_s: float) -> None:
    """In threads that nobody waits for longer, and that end with the process."""
    threads = [threading.Thread(target=work, daemon=True, name="inventory") for work in works]
    for thread in threads:
        thread.start()
    until = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _list_here(api: Api, resource: Resource, names: Mapping[Resource, Iterable[str]], found: Inventory) -> None:
    try:
        objects, cut = list_some(api, resource, resource.path(api.namespace))
    except Forbidden:
        _get_named(api, resource, names.get(resource, ()), found)
        return
    except OrchestratorError as error:
        found.missing[resource.kind] = _why(resource, error)
        return
    _keep(found, resource.kind, objects, cut)


def _list_everywhere(api: Api, resource: Resource, found: Inventory) -> None:
    """All namespaces, or this one alone."""
    try:
        try:
            objects, cut = list_some(api, resource, f"{resource.root}/{resource.plural}")
        except Forbidden:
            objects, cut = list_some(api, resource, resource.path(api.namespace))
            cut = cut or f"only those of namespace {api.namespace}: no right to list {resource.plural} of all"
    except OrchestratorError as error:
        found.missing[resource.kind] = _why(resource, error)
        return
    _keep(found, resource.kind, objects, cut)


def _get_named(api: Api, resource: Resource, names: Iterable[str], found: Inventory) -> None:
    """One by one, what the run refers to; what is not among them afterwards is not there."""
    objects = []
    try:
        for name in dict.fromkeys(names):
            one = api.find(resource, name, metadata_only=resource in NAMES_ONLY)
            objects += [one] if one else []
    except OrchestratorError as error:
        found.missing[resource.kind] = _why(resource, error)
        return
    if not names:
        found.missing[resource.kind] = f"no right to list {resource.plural}"
        return
    _keep(found, resource.kind, objects, f"only those that the run names: no right to list {resource.plural}")


def _read_namespace(api: Api, found: Inventory) -> None:
    try:
        one = api.find(NAMESPACE, api.namespace)
    except OrchestratorError as error:
        found.missing[NAMESPACE.kind] = _why(NAMESPACE, error)
        return
    _keep(found, NAMESPACE.kind, [one] if one else [], "")


def _read_rights(api: Api, found: Inventory) -> None:
    """What whoever asks may do in the namespace."""
    body = {"apiVersion": RIGHTS.api, "kind": RIGHTS.kind, "spec": {"namespace": api.namespace}}
    try:
        found.objects[RIGHTS.kind] = [{"metadata": {"name": api.namespace}, **_asked(api, body)}]
    except OrchestratorError as error:
        found.missing[RIGHTS.kind] = _why(RIGHTS, error)


def _asked(api: Api, body: Object) -> Object:
    return {"status": api.call(Request("POST", RIGHTS.path(api.namespace), body=body)).get("status") or {}}


def _with_images_once(nodes: list[Object]) -> list[Object]:
    """Which images there are is asked of all nodes together, and each node has the same fifty: those are kept once."""
    seen: set[str] = set()
    kept = []
    for node in nodes:
        images = [one for one in (node.get("status") or {}).get("images") or [] if not seen.issuperset(one["names"])]
        seen.update(name for one in images for name in one["names"])
        names = [{"names": one["names"]} for one in images]
        kept.append({**node, "status": {**(node.get("status") or {}), "images": names}})
    return kept


def _keep(found: Inventory, kind: str, objects: list[Object], cut: str) -> None:
    found.objects[kind] = objects
    if cut:
        found.limits[kind] = cut


def _why(resource: Resource, error: OrchestratorError) -> str:
    if isinstance(error, Forbidden):
        return error.right
    if isinstance(error, NotServed):
        return f"the cluster does not serve {resource.plural} of {resource.api}"
    return str(error).partition(". Way out")[0]


def list_some(api: Api, resource: Resource, path: str) -> tuple[list[Object], str]:
    """At most `MOST` objects, page by page, and what was left out."""
    query = {"limit": str(PAGE)}
    accept = METADATA_LIST if resource in NAMES_ONLY else "application/json"
    most = MOST if resource is not EVENT else MOST * 2
    items: list[Object] = []
    while True:
        page = api.call(Request("GET", path, query, accept=accept))
        items += page.get("items") or []
        query["continue"] = page["metadata"].get("continue", "")
        if not query["continue"] or len(items) >= most:
            break
    items = items[:most]
    cut = f"only the first {most:,}" if query["continue"] else ""
    if resource is EVENT and len(items) > MOST_EVENTS:
        items = sorted(items, key=event_time)[-MOST_EVENTS:]
        cut = f"only the newest {MOST_EVENTS:,}"
    return items, cut
