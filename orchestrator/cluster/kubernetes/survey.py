"""A snapshot of a namespace and of what it lies in, with one run or without; reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from orchestrator.cluster.kubernetes.api import Api
from orchestrator.cluster.kubernetes.facts import facts_of, newest_progress
from orchestrator.cluster.kubernetes.failures import Busy
from orchestrator.cluster.kubernetes.inventory import read_inventory
from orchestrator.cluster.kubernetes.packing import packs
from orchestrator.cluster.kubernetes.pods import cause_of, container_of, end_of, failed_setup, has_started, index_of
from orchestrator.cluster.kubernetes.resources import (
    ACCOUNT,
    CLAIM,
    CONFIG_MAP,
    POD,
    RUN,
    SECRET,
    SERVICE,
    Resource,
)  # fmt: skip
from orchestrator.cluster.kubernetes.runs import Found, bundle_of, get_run, observe
from orchestrator.cluster.kubernetes.states import state_of
from orchestrator.cluster.kubernetes.trimmed import clean
from orchestrator.cluster.lines import read_lines
from orchestrator.cluster.predicted import predicted_memory
from orchestrator.cluster.snapshot import Snapshot, now
from orchestrator.cluster.testimony import LINES
from orchestrator.errors import OrchestratorError

Object = dict[str, Any]
PODS = 4
"""Whose last lines are kept: that of the first failure, then the first nodes'."""
LOG_S = 10.0


def survey(api: Api, run_id: str | None = None, coming: Sequence[Object] = ()) -> Snapshot:
    """`coming`: objects that may be sent, of which it matters what they refer to.

    Raises UserError for a run that the namespace does not have.
    """
    taken, record, names, uids = now(), dict[str, Any](), dict[Resource, Iterable[str]](), set[str]()
    if coming:
        names = _named_by({**coming[-1], "spec": list(coming)}, ())
    if run_id is not None:
        found = get_run(api, run_id)
        record, pods = _record(api, found)
        names, uids = _named_by(found.run, pods), {found.uid}
    inventory = read_inventory(api, names, lambda obj: _is_ours(obj, run_id, uids))
    place = f"{api.server} ({api.context})"
    return Snapshot(taken, "kubernetes", place, api.namespace, run_id, inventory.objects, inventory.missing,
                    inventory.limits, record)  # fmt: skip


def _is_ours(obj: Object, run_id: str | None, uids: set[str]) -> bool:
    """By its label, or because something of ours made it: controllers come after what they make is asked for."""
    meta = obj["metadata"]
    if run_id is None:
        return False
    owners = {owner.get("uid") for owner in meta.get("ownerReferences") or ()}
    named = str(meta.get("name", "")).startswith(run_id)
    return (meta.get("labels") or {}).get(RUN) == run_id or bool(owners & uids) or named


def _record(api: Api, found: Found) -> tuple[dict[str, Any], Sequence[Object]]:
    """Where the run stands by its objects and by what its pods printed."""
    seen = observe(api, found)
    progress, lines = dict[str, Any](), list[dict[str, Any]]()
    try:
        progress = newest_progress(api, seen.pods)
        lines = [group for pod in _speaking(seen.pods) for group in _lines_of(api, pod)]
    except OrchestratorError:  # a snapshot without its last lines is worth more than none
        pass
    facts = facts_of(found.run, state_of(seen), progress)
    ends = [end for end in map(end_of, seen.pods) if end]
    first = cause_of(ends)
    end = {"exit_code": first.exit_code, "rank": first.rank, "error": first.error} if first else {}
    record = {"facts": facts, "end": end, "lines": lines}
    if any("OOMKilled" in (end.error or "") for end in ends) and not packs(found.run):
        with suppress(OrchestratorError):  # no right to read config maps
            run = bundle_of(api, found.run["metadata"]["name"])
            record["predicted"] = run and predicted_memory(run)
    return clean(record), seen.pods


def _speaking(pods: Sequence[Object]) -> list[Object]:
    """Pods with a log, the one that failed first before the others."""
    first = cause_of(end for end in map(end_of, pods) if end)
    there = [pod for pod in pods if has_started(pod) or failed_setup(pod)]
    return sorted(there, key=lambda pod: (first is None or pod["metadata"]["name"] != first.pod, index_of(pod)))[:PODS]


def _lines_of(api: Api, pod: Object) -> list[dict[str, Any]]:
    """The last lines of each rank of a pod, and of its launcher; none where its node does not answer."""
    query = {"container": failed_setup(pod) or container_of(pod), "tailLines": str(4 * LINES)}
    path = POD.path(api.namespace, pod["metadata"]["name"], "log")
    try:
        texts = [line.decode(errors="replace") for line in api.stream(path, query, LOG_S, patient=False)]
    except Busy:
        return []
    groups: dict[tuple[int, int | None], list[str]] = {}
    for said in read_lines(texts):
        if said.kind == "log":
            groups.setdefault((said.attempt, said.rank), []).append(said.text)
    if not groups:
        groups[0, None] = texts
    told = [{"attempt": attempt, "rank": rank, "lines": lines[-LINES:]} for (attempt, rank), lines in groups.items()]
    return [{"pod": pod["metadata"]["name"], **one} for one in told]


def _named_by(run: Object, pods: Sequence[Object]) -> dict[Resource, Iterable[str]]:
    """What the pods of a run refer to, by kind; where there is no pod, what its templates do."""
    specs = [pod["spec"] for pod in pods] or list(_templates(run.get("spec") or {}))
    volumes = [volume for spec in specs for volume in spec.get("volumes") or []]
    pulls = [one["name"] for spec in specs for one in spec.get("imagePullSecrets") or []]
    return {
        CLAIM: [one["persistentVolumeClaim"]["claimName"] for one in volumes if one.get("persistentVolumeClaim")],
        SECRET: [*(one["secret"]["secretName"] for one in volumes if one.get("secret")), *pulls],
        CONFIG_MAP: [one["configMap"]["name"] for one in volumes if one.get("configMap")],
        SERVICE: [spec["subdomain"] for spec in specs if spec.get("subdomain")] or [run["metadata"]["name"]],
        ACCOUNT: [spec["serviceAccountName"] for spec in specs if spec.get("serviceAccountName")],
    }


def _templates(value: Any) -> Iterable[Object]:
    """Every pod's spec within a run's."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        else:
            for item in value.values():
                yield from _templates(item)
    elif isinstance(value, list):
        for item in value:
            yield from _templates(item)
