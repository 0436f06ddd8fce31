"""The kinds of objects that this product reads and writes, and where the server keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.options import JobKind

PRODUCT = "app.kubernetes.io/name=orchestrator"
"""Label of every object of ours."""
RUN = "orchestrator/run"
"""Label with the id of the run."""
ASK = "orchestrator/ask"
"""Annotation of a pod: what its launcher is asked for."""
STOPPED = "orchestrator/stopped"
"""Annotation of a run that `cancel` suspended: when, so that it is told from one that waits in a queue."""
SUBMISSION = "orchestrator/submission"
"""Annotation: which submitter created the run."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind as the server serves it."""

    api: str
    """apiVersion: `v1`, or group/version."""
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def group(self) -> str:
        return self.api.rpartition("/")[0]

    @property
    def root(self) -> str:
        return f"/apis/{self.api}" if self.group else f"/api/{self.api}"

    def path(self, namespace: str, name: str = "", part: str = "") -> str:
        """`part`: a subresource, e.g. log."""
        where = f"/namespaces/{namespace}" if self.namespaced else ""
        return "/".join(word for word in (f"{self.root}{where}/{self.plural}", name, part) if word)


JOB = Resource("batch/v1", "jobs", "Job")
JOBSET = Resource("jobset.x-k8s.io/v1alpha2", "jobsets", "JobSet")
TRAINJOB = Resource("trainer.kubeflow.org/v1alpha1", "trainjobs", "TrainJob")
RAYJOB = Resource("ray.io/v1", "rayjobs", "RayJob")
POD = Resource("v1", "pods", "Pod")
EVENT = Resource("v1", "events", "Event")
CONFIG_MAP = Resource("v1", "configmaps", "ConfigMap")
SERVICE = Resource("v1", "services", "Service")
SECRET = Resource("v1", "secrets", "Secret")
CLAIM = Resource("v1", "persistentvolumeclaims", "PersistentVolumeClaim")
ACCOUNT = Resource("v1", "serviceaccounts", "ServiceAccount")
PRIORITY = Resource("scheduling.k8s.io/v1", "priorityclasses", "PriorityClass", namespaced=False)
QUEUE = Resource("kueue.x-k8s.io/v1beta1", "localqueues", "LocalQueue")
WORKLOAD = Resource("kueue.x-k8s.io/v1beta1", "workloads", "Workload")
QUEUE_PRIORITY = Resource("kueue.x-k8s.io/v1beta1", "workloadpriorityclasses", "WorkloadPriorityClass", False)
NETWORK_POLICY = Resource("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy")
TRAINING_RUNTIME = Resource("trainer.kubeflow.org/v1alpha1", "trainingruntimes", "TrainingRuntime")
ACCESS_REVIEW = Resource("authorization.k8s.io/v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview", False)

KINDS = {JobKind.job: JOB, JobKind.jobset: JOBSET, JobKind.trainjob: TRAINJOB, JobKind.rayjob: RAYJOB}
"""What a run is, by `cluster.kind`."""
SENT = {one.kind: one for one in (*KINDS.values(), CONFIG_MAP, SERVICE, NETWORK_POLICY, TRAINING_RUNTIME)}


def resource_of(obj: dict[str, Any]) -> Resource:
    """Where an object of a run belongs."""
    return SENT[obj["kind"]]


def is_run(obj: dict[str, Any]) -> bool:
    """Whether an object is a run itself and not a Job that another controller made for one."""
    return not is_controlled(obj) and RUN in obj["metadata"].get("labels", {})


def is_controlled(obj: dict[str, Any]) -> bool:
    """Whether a controller made it for another object."""
    return any(owner.get("controller") for owner in obj["metadata"].get("ownerReferences", ()))


def run_of(obj: dict[str, Any]) -> str:
    """The id of the run that an object belongs to."""
    return str(obj["metadata"]["labels"][RUN])
