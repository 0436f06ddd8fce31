"""From the job as data to the objects of one kind, in the order of creation. Pure: a dry run prints what is sent."""

from __future__ import annotations

import base64
import json
from math import ceil
from typing import Any

from orchestrator.cluster.job import PACKS, JobSpec
from orchestrator.cluster.kubernetes import pod, rayjob, retries
from orchestrator.cluster.kubernetes.mounts import code_name, run_name
from orchestrator.cluster.kubernetes.packing import packer
from orchestrator.cluster.kubernetes.states import QUEUE
from orchestrator.cluster.kubernetes.templates import template
from orchestrator.options import JobKind

Object = dict[str, Any]
ROLE = "node"
"""Name of the one replicated Job of a JobSet; its pods are RUN-node-0-N."""
LARGEST_ARCHIVE = 900 << 10
"""Bytes: an object may have 1 MiB, and the archive grows by a third as text."""
QUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
START_DEADLINE = "orchestrator/start-deadline-s"
"""Annotation: nothing in a cluster ends a run that never starts, so who looks at it does."""


def render(spec: JobSpec, kind: JobKind, archive: bytes | None = None) -> list[Object]:
    """`archive`: the code as code.tar.gz; None where the image or the cluster has it already. One in a store is no
    object."""
    makers = {JobKind.job: _job, JobKind.jobset: _jobset, JobKind.trainjob: _trainjob, JobKind.rayjob: _rayjob}
    assert kind in makers, "auto has been resolved"
    code = [code_config_map(spec, archive)] if archive is not None and not spec.archive_url else []
    if spec.component == PACKS:
        return [*code, run_config_map(spec), _packing(spec)]
    return [*code, run_config_map(spec), _network_policy(spec, kind), *makers[kind](spec)]


def remarks(spec: JobSpec, kind: JobKind) -> list[str]:
    """What a kind cannot do of what was asked for, in sentences."""
    said = []
    if kind is JobKind.trainjob and spec.queue:
        said.append(
            f"cluster.queue = {spec.queue}: Kueue 0.10 knows no TrainJob, so this run does not wait in the queue and "
            "has no priority. Way out: cluster.kind=jobset"
        )
    if kind in (JobKind.trainjob, JobKind.rayjob) and spec.ttl_s:
        said.append(f"cluster.ttl_s = {spec.ttl_s:g}: a {kind.name} has none and stays until `orchestrator rm`")
    if spec.resources.rdma:
        said.append(f"cluster.rdma = {spec.resources.rdma}: needs IPC_LOCK, which a `restricted` namespace forbids")
    return said


def run_config_map(spec: JobSpec) -> Object:
    text = json.dumps(spec.bundle, indent=1, sort_keys=True) + "\n"
    return template("run_config_map", name=run_name(spec), labels=pod.labels(spec), run_json=text)


def code_config_map(spec: JobSpec, archive: bytes) -> Object:
    """The same for every run with this code, so it bears no run's label."""
    digest = spec.archive_digest
    assert digest is not None, "there is an archive"
    assert len(archive) <= LARGEST_ARCHIVE, "a larger one goes to a store"
    product = {key: value for key, value in pod.labels(spec).items() if key != pod.RUN}
    encoded = base64.b64encode(archive).decode()
    return template("code_config_map", name=code_name(digest), labels=product, archive=encoded)


def _network_policy(spec: JobSpec, kind: JobKind) -> Object:
    operator = rayjob.OPERATOR if kind is JobKind.rayjob else None
    selector = {pod.RUN: spec.run_id}
    labels = pod.labels(spec)
    return template("network_policy", name=spec.run_id, labels=labels, selector=selector, operator=operator)


def _job(spec: JobSpec) -> list[Object]:
    """A headless service names the pods: RUN-0.RUN is the first."""
    labels = pod.labels(spec)
    service = template("service", name=spec.run_id, labels=labels, selector=pod.trained(spec))
    node = pod.node(spec, f"{spec.run_id}-0.{spec.run_id}", subdomain=spec.run_id)
    return [service, _indexed(spec, _head(spec, queued=spec.queue is not None), node)]


def _packing(spec: JobSpec) -> Object:
    """Nothing meets there and nothing listens, so the Job has neither service nor policy."""
    head = _head(spec, queued=spec.queue is not None)
    return _indexed(spec, {**head, "labels": {**head["labels"], pod.COMPONENT: PACKS}}, packer(spec))


def _indexed(spec: JobSpec, head: dict[str, Any], node: dict[str, Any]) -> Object:
    return template(
        "job",
        **head,
        num_nodes=spec.num_nodes,
        backoff_limit=retries.backoff_limit(spec),
        pod_rules=retries.job_rules(),
        deadline_s=seconds(spec.deadline_s),
        ttl_s=seconds(spec.ttl_s),
        pod=node,
    )


def _jobset(spec: JobSpec) -> list[Object]:
    head = _head(spec, queued=spec.queue is not None)
    inner = _jobset_spec(spec, suspend=head["suspend"], ttl_s=seconds(spec.ttl_s))
    return [template("jobset", **head, jobset=inner)]


def _trainjob(spec: JobSpec) -> list[Object]:
    """No ttl for the JobSet: Trainer takes a failure back at each look and would start a removed set again."""
    head = _head(spec, queued=False)
    plain = {key: head[key] for key in ("name", "labels", "annotations")}
    inner = _jobset_spec(spec, job_labels={"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"})
    runtime = template("runtime", **plain, num_nodes=spec.num_nodes, jobset=inner)
    return [runtime, template("trainjob", **head, num_nodes=spec.num_nodes)]


def _jobset_spec(spec: JobSpec, **differing: Any) -> Object:
    """The service that a JobSet makes is named like the set."""
    only = {"suspend": None, "ttl_s": None, "job_labels": None, **differing}
    return template(
        "jobset_spec",
        **only,
        max_restarts=spec.max_restarts,
        set_rules=retries.set_rules(),
        role=ROLE,
        replicas=1,
        num_nodes=spec.num_nodes,
        backoff_limit=0,
        pod_rules=retries.set_job_rules(),
        deadline_s=seconds(spec.deadline_s),
        pod=pod.node(spec, f"{spec.run_id}-{ROLE}-0-0.{spec.run_id}", subdomain=None),
    )


def _rayjob(spec: JobSpec) -> list[Object]:
    head = _head(spec, queued=spec.queue is not None)
    return [template("rayjob", **head, **rayjob.slots(spec), deadline_s=seconds(spec.deadline_s))]


def _head(spec: JobSpec, queued: bool) -> dict[str, Any]:
    """Name, labels, annotations and whether the run waits: a queue starts what it admits."""
    queue = {QUEUE: spec.queue, QUEUE_PRIORITY: spec.priority} if queued else {}
    waits = {START_DEADLINE: str(seconds(spec.start_deadline_s) or "")}
    return {
        "name": spec.run_id,
        "labels": {**pod.labels(spec), **_present(queue)},
        "annotations": {**pod.provenance(spec), **_present(waits)},
        "suspend": queued,
    }


def _present(pairs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in pairs.items() if value}


def seconds(value: float) -> int | None:
    """Whole seconds, rounded up; None where 0 means never."""
    return ceil(value) or None
