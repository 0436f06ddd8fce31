"""Whether what a run refers to is there, as far as the rights go: asked before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.cluster.job import JobSpec
from orchestrator.cluster.kubernetes.api import Api, Object
from orchestrator.cluster.kubernetes.failures import Forbidden, NotServed
from orchestrator.cluster.kubernetes.resources import (
    ACCOUNT,
    CLAIM,
    PRIORITY,
    QUEUE,
    QUEUE_PRIORITY,
    SECRET,
    Resource,
)  # fmt: skip
from orchestrator.errors import ConfigError, nearest

KEY_OF_SECRET = {"tracking": "tracking.secret", "store": "cluster.store_secret"}


@dataclass(frozen=True, slots=True)
class Reference:
    """An object that the config names."""

    key: str
    name: str
    resource: Resource
    check: Callable[[Object], str | None] = lambda found: None
    """The rule that the object breaks, if any."""
    secret: bool = False


def check_references(api: Api, spec: JobSpec) -> list[str]:
    """What could not be checked, one sentence each. Raises ConfigError for what is not there."""
    notes = []
    for reference in references_of(spec):
        try:
            _check(api, reference)
        except Forbidden:
            what = f"{reference.key} = {reference.name}"
            notes.append(f"{what}: not checked: no right to get {reference.resource.plural}")
    return notes


def references_of(spec: JobSpec) -> Iterator[Reference]:
    """Each once."""
    for volume in {volume.claim: volume for volume in spec.volumes}.values():
        shared = spec.num_nodes > 1 and not volume.read_only
        yield Reference("cluster.volumes", volume.claim, CLAIM, _shared_claim if shared else _claim)
    for name in spec.pull_secrets:
        yield Reference("cluster.pull_secrets", name, SECRET, secret=True)
    for purpose, name in dict.fromkeys((secret.purpose, secret.name) for secret in spec.secrets):
        yield Reference(KEY_OF_SECRET[purpose], name, SECRET, secret=True)
    if spec.service_account:
        yield Reference("cluster.service_account", spec.service_account, ACCOUNT)
    if spec.queue:
        yield Reference("cluster.queue", spec.queue, QUEUE)
    if spec.priority:
        yield Reference("cluster.priority", spec.priority, QUEUE_PRIORITY if spec.queue else PRIORITY)


def _check(api: Api, reference: Reference) -> None:
    """Of a secret only the metadata is asked for: what it holds never comes here."""
    key, name, resource = reference.key, reference.name, reference.resource
    try:
        found = api.find(resource, name, metadata_only=reference.secret)
    except NotServed as error:
        rule = f"the cluster has no {resource.kind}: Kueue is not installed"
        raise ConfigError(key, name, rule, f"{key}=null, or let its operator install Kueue") from error
    if found is None:
        where = f"namespace {api.namespace}" if resource.namespaced else "the cluster"
        raise ConfigError(key, name, f"{where} has no such {resource.kind}", _way_out(api, resource, name))
    broken = reference.check(found)
    if broken:
        raise ConfigError(key, name, broken, "name another claim")


def _way_out(api: Api, resource: Resource, name: str) -> str:
    create = f"create it, or name another {resource.kind}"
    if resource is SECRET:  # who may list secrets may read them all
        return create
    try:
        names = [one["metadata"]["name"] for one in api.list(resource)[0]]
    except Forbidden as error:
        return f"{create} (which there are is not told: {error.right})"
    return f"{create} ({nearest(name, names)})" if names else create


def _claim(claim: Object) -> str | None:
    phase = (claim.get("status") or {}).get("phase")
    return "the claim has lost its volume" if phase == "Lost" else None


def _shared_claim(claim: Object) -> str | None:
    modes = claim.get("spec", {}).get("accessModes") or []
    if "ReadWriteMany" not in modes:
        return f"several nodes write there, and the claim allows only {', '.join(modes) or 'nothing'}"
    return _claim(claim)
