"""The quick start's first step on a live cluster: by us, and by a Job with a Service as one writes them by hand."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from administrator import post

from orchestrator.cluster.kubernetes.api import Api, connect
from orchestrator.cluster.kubernetes.inventory import NAMESPACE
from orchestrator.cluster.kubernetes.resources import CLAIM, CONFIG_MAP, JOB, POD, SERVICE, Resource
from tests.bench.__main__ import BIN, run
from tests.bench.first_step import QUICK, RAW, first_step, said_first
from tests.launching import wait_for

PYTHON = os.environ.get("ORCHESTRATOR_TEST_PYTHON", sys.executable)
CLAIMED = "cluster.volumes=[{claim: runs, path: /runs, read_only: false}]"


@dataclass(frozen=True)
class Rivals:
    """A namespace with a claim that holds the digits."""

    api: Api
    image: str

    @classmethod
    @contextmanager
    def standing(cls) -> Iterator[Rivals]:
        own = Path(os.environ["KUBECONFIG"]).parent / "image"
        image = os.environ.get("ORCHESTRATOR_TEST_IMAGE") or own.read_text().strip()
        api = connect(namespace=f"orchestrator-bench-{uuid.uuid4().hex[:6]}")
        post(api, NAMESPACE, {"metadata": {"name": api.namespace}})
        try:
            claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}},
                     "storageClassName": os.environ.get("ORCHESTRATOR_TEST_STORAGE", "shared")}  # fmt: skip
            post(api, CLAIM, {"metadata": {"name": "runs"}, "spec": claim})
            rivals = cls(api, image)
            run(BIN / "orchestrator", "shards", "make", "digits", "/runs/data/digits", *rivals.cluster, "--follow")
            yield rivals
        finally:
            api.delete(NAMESPACE, api.namespace)

    @property
    def cluster(self) -> tuple[str, ...]:
        return (
            "cluster=kubernetes", "cluster.kind=job", f"cluster.image={self.image}", f"cluster.python={PYTHON}",
            f"cluster.namespace={self.api.namespace}", CLAIMED, "cluster.cpus_per_process=0.5",
            "cluster.memory_gib_per_process=2", "cluster.disk_gib=1",
        )  # fmt: skip

    def ours(self) -> float:
        name, chosen = f"run-{uuid.uuid4().hex[:6]}", ("cluster=kubernetes", f"cluster.namespace={self.api.namespace}")
        with tempfile.TemporaryDirectory() as folder:
            began = time.time()
            more = ("compute.num_nodes=2", "runs_dir=/runs/runs", "data_dir=/runs/data", f"name={name}", "--follow")
            run(BIN / "orchestrator", "train", *QUICK, *self.cluster, *more, "cluster.canary=false")
            (run_id,) = [one for one in run(BIN / "orchestrator", "ls", *chosen).split() if one.startswith(name)]
            run(BIN / "orchestrator", "pull", run_id, *chosen, "--to", folder)
            return first_step(Path(folder)) - began

    def theirs(self) -> float:
        name, began = f"raw-{uuid.uuid4().hex[:6]}", time.time()
        for resource, obj in by_hand(name, self.image):
            post(self.api, resource, obj)
        wait_for(lambda: (self.api.get(JOB, name).get("status") or {}).get("succeeded") == 2, name, 180)
        names = [pod["metadata"]["name"] for pod in self.api.list(POD, f"job-name={name}")[0]]
        (first,) = [one for one in names if one.startswith(f"{name}-0")]
        path = POD.path(self.api.namespace, first, "log")
        return said_first(b"".join(self.api.stream(path, {}, 10.0)).decode()) - began


def by_hand(name: str, image: str) -> list[tuple[Resource, dict[str, Any]]]:
    """The script, the name of the first pod, and a Job whose pods run torchrun."""
    words = [PYTHON, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank",
             "$(INDEX)", "--master-addr", f"{name}-0.{name}", "--master-port", "29500", "/script/raw_job.py",
             "torchrun", "/runs/data/digits/train"]  # fmt: skip
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    container = {
        "name": "train", "image": image, "command": words,
        "env": [{"name": "INDEX", "valueFrom": index}, {"name": "OMP_NUM_THREADS", "value": "1"}],
        "resources": {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "2Gi"}},
        "volumeMounts": [{"name": "script", "mountPath": "/script"}, {"name": "runs", "mountPath": "/runs"},
                         {"name": "shm", "mountPath": "/dev/shm"}],
    }  # fmt: skip
    pod = {
        "subdomain": name, "restartPolicy": "Never", "containers": [container],
        "securityContext": {"runAsUser": 1000, "fsGroup": 1000},
        "volumes": [{"name": "script", "configMap": {"name": name}},
                    {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}},
                    {"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }  # fmt: skip
    spec = {"completionMode": "Indexed", "completions": 2, "parallelism": 2, "backoffLimit": 0,
            "template": {"metadata": {"labels": {"raw": name}}, "spec": pod}}  # fmt: skip
    meta = {"metadata": {"name": name}}
    service = {"clusterIP": "None", "selector": {"raw": name}, "publishNotReadyAddresses": True}
    script = {"raw_job.py": RAW.read_text()}
    return [(CONFIG_MAP, {**meta, "data": script}), (SERVICE, {**meta, "spec": service}), (JOB, {**meta, "spec": spec})]
