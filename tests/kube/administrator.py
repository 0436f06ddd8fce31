"""What an administrator does to a cluster in these tests: objects, queues, rights taken and given back, nodes lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from launching import wait_for

from orchestrator.cluster.kubernetes.api import Api, Object, Request
from orchestrator.cluster.kubernetes.failures import Conflict
from orchestrator.cluster.kubernetes.inventory import CLUSTER_QUEUE, FLAVOR, NODE
from orchestrator.cluster.kubernetes.resources import QUEUE, QUEUE_PRIORITY, Resource

K8S = Path(__file__).parents[2] / "k8s"
RBAC, REVIEWS = "rbac.authorization.k8s.io/v1", "authorization.k8s.io/v1"
ROLE = Resource(RBAC, "roles", "Role")
CLUSTER_ROLE = Resource(RBAC, "clusterroles", "ClusterRole", namespaced=False)
CLUSTER_BINDING = Resource(RBAC, "clusterrolebindings", "ClusterRoleBinding", namespaced=False)
REVIEW = Resource(REVIEWS, "subjectaccessreviews", "SubjectAccessReview", namespaced=False)
OUT_OF_SERVICE = {"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}
"""By which a cloud, or a person, says that a node is off and its pods are gone for good."""


def post(api: Api, resource: Resource, obj: Object, **query: str) -> Object:
    """Create an object."""
    body = {"apiVersion": resource.api, "kind": resource.kind, **obj}
    return api.call(Request("POST", resource.path(api.namespace), query, body))


@contextmanager
def standing(api: Api, objects: Sequence[tuple[Resource, Object]]) -> Iterator[None]:
    """Objects that are there for a while."""
    made: list[tuple[Resource, str]] = []
    try:
        for resource, obj in objects:
            made.append((resource, post(api, resource, obj)["metadata"]["name"]))
        yield
    finally:
        for resource, name in reversed(made):
            api.delete(resource, name)


@contextmanager
def queue_of(api: Api, suffix: str, quotas: dict[str, str]) -> Iterator[str]:
    """A queue of this namespace alone, and the classes NAME-low and NAME-high; yields NAME.

    Who has a higher class takes the place of who has a lower one.
    """
    name = f"{api.namespace}-{suffix}"
    flavor = {"name": name, "resources": [{"name": key, "nominalQuota": value} for key, value in quotas.items()]}
    spec = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": api.namespace}},
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [{"coveredResources": list(quotas), "flavors": [flavor]}],
    }
    meta = {"metadata": {"name": name}}
    classes = [(QUEUE_PRIORITY, {"metadata": {"name": f"{name}-{kind}"}, "value": value})
               for kind, value in (("low", 10), ("high", 1000))]  # fmt: skip
    local = (QUEUE, {**meta, "spec": {"clusterQueue": name}})
    with standing(api, [(FLAVOR, meta), (CLUSTER_QUEUE, {**meta, "spec": spec}), local, *classes]):
        yield name


@dataclass(frozen=True)
class Right:
    """One verb on one resource, as a Role gives it."""

    group: str
    resource: str
    verb: str

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}"


def load(path: str) -> Object:
    """An object in a file of k8s/."""
    return yaml.safe_load((K8S / path).read_text())


def rights_of(path: str) -> list[Right]:
    """Every one that a role in a file of k8s/ gives."""
    return [
        Right(group, resource, verb)
        for rule in load(path)["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]


@dataclass(frozen=True)
class Rights:
    """Those of the namespace's submitter, by its Role."""

    api: Api

    @contextmanager
    def without(self, *taken: Right) -> Iterator[None]:
        """Take some away for a while."""
        whole = self.api.get(ROLE, "submitter")["rules"]
        left = [one for rule in whole for one in _less(rule, taken)]
        self.api.patch(ROLE, "submitter", {"rules": left})
        try:
            for right in taken:
                wait_for(lambda right=right: not self.has(right), f"the loss of {right}", 10)
            yield
        finally:
            self.api.patch(ROLE, "submitter", {"rules": whole})
            for right in taken:
                wait_for(lambda right=right: self.has(right), f"the return of {right}", 10)

    def has(self, right: Right) -> bool:
        """By the API server's own judgement."""
        resource, _, part = right.resource.partition("/")
        asked = {"namespace": self.api.namespace, "verb": right.verb, "group": right.group, "resource": resource,
                 "subresource": part}  # fmt: skip
        user = f"system:serviceaccount:{self.api.namespace}:submitter"
        spec = {"user": user, "resourceAttributes": asked}
        return bool(post(self.api, REVIEW, {"spec": spec})["status"]["allowed"])


def _less(rule: Object, taken: Sequence[Right]) -> list[Object]:
    """A rule as one rule for each resource, without some rights."""
    (group,) = rule["apiGroups"]
    verbs = {
        resource: [verb for verb in rule["verbs"] if Right(group, resource, verb) not in taken]
        for resource in rule["resources"]
    }
    return [{"apiGroups": [group], "resources": [key], "verbs": value} for key, value in verbs.items() if value]


def rig_script() -> Path | None:
    """The program that starts and stops nodes of a test cluster, where KUBECONFIG is that cluster's."""
    beside = Path(__file__).parents[3] / "shared" / "kube"
    rig = Path(os.environ.get("ORCHESTRATOR_TEST_KUBE", beside)) / "rig"
    if not rig.is_file():
        return None
    told = subprocess.run([sys.executable, str(rig), "env"], capture_output=True, text=True, check=True).stdout
    return rig if f"KUBECONFIG={os.environ.get('KUBECONFIG')} " in told else None


@dataclass(frozen=True)
class Machines:
    """The nodes of the test cluster, and the cloud that they lie in."""

    api: Api
    rig: Path

    @contextmanager
    def lost(self, node: str) -> Iterator[None]:
        """Kill a node, containers included, and declare it off as a cloud does; it comes back at the end."""
        self._rig("stop", node)
        try:
            wait_for(lambda: not self._is_ready(node), f"the loss of {node}", 60)
            self._taint(node, [OUT_OF_SERVICE])
            yield
        finally:
            self._rig("start", node)
            self._taint(node, [])
            wait_for(lambda: self._is_ready(node), f"{node} to come back", 60)

    def _rig(self, what: str, node: str) -> None:
        subprocess.run([sys.executable, str(self.rig), "node", what, node], check=True)

    def _is_ready(self, node: str) -> bool:
        conditions = self.api.get(NODE, node)["status"]["conditions"]
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    def _taint(self, node: str, taints: list[Object]) -> None:
        """In the place of those that a cloud had put there; others are the controllers'."""

        def tainted() -> bool:
            found = self.api.get(NODE, node)
            kept = [one for one in found["spec"].get("taints") or [] if one["key"] != OUT_OF_SERVICE["key"]]
            meta = {"resourceVersion": found["metadata"]["resourceVersion"]}
            try:
                self.api.patch(NODE, node, {"metadata": meta, "spec": {"taints": [*kept, *taints]}})
            except Conflict:
                return False
            return True

        wait_for(tainted, f"a quiet moment of {node}", 20)
