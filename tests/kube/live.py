"""Runs on a live cluster as tests send and watch them, by the commands of a user."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launching import Answer, Cli

from orchestrator.cluster.kubernetes.api import Api, Object, Request
from orchestrator.cluster.kubernetes.pod import COMPONENT
from orchestrator.cluster.kubernetes.pods import index_of, is_running
from orchestrator.cluster.kubernetes.resources import POD
from orchestrator.cluster.kubernetes.runs import pods_of

TRAIN = (
    "data=synthetic", "data.image_size=8", "data.padding=1", "data.num_workers=0", "model=cifar_resnet20",
    "recipe.global_batch_size=16", "recipe.warmup_epochs=0", "compute=cpu2", "tracking=disabled",
    "tracking.log_every_steps=1",
)  # fmt: skip
MAKE_SHARDS = (
    "synthetic", "OUT", "--samples", "144", "--classes", "4", "--size", "8", "--samples-per-shard", "40",
    "--val-fraction", "0.25", "--workers", "1",
)  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Where live tests go."""

    api: Api
    image: str
    python: str
    storage: str
    claim: str = "runs"

    def overrides(self, kind: str, runs: str) -> tuple[str, ...]:
        """Of a run on two nodes; `runs`: the folder on the claim."""
        volumes = f"cluster.volumes=[{{claim: {self.claim}, path: /runs, read_only: false}}]"
        return (
            "cluster=kubernetes", f"cluster.kind={kind}", f"cluster.image={self.image}",
            f"cluster.python={self.python}",
            f"cluster.namespace={self.api.namespace}", volumes, f"runs_dir=/runs/{runs}", "data_dir=/runs/data",
            "compute.num_nodes=2", "cluster.memory_gib_per_process=2", "cluster.cpus_per_process=0.5",
            "cluster.disk_gib=1", "cluster.grace_s=30", "cluster.canary=false",
        )  # fmt: skip

    @property
    def verbs(self) -> tuple[str, ...]:
        """What `status` and its like need to find the cluster."""
        return ("cluster=kubernetes", f"cluster.namespace={self.api.namespace}")


@dataclass(frozen=True)
class Live:
    """A run on the cluster, by the commands of a user."""

    cli: Cli
    cluster: Cluster
    run_id: str

    def verb(self, name: str, *words: str) -> Answer:
        return self.cli(name, self.run_id, *self.cluster.verbs, *words)

    def facts(self) -> dict[str, Any]:
        answer = self.verb("status", "--json")
        assert answer.code == 0, answer.err
        return answer.json()

    def wait(self, test: Callable[[dict[str, Any]], bool], what: str, timeout_s: float = 120) -> dict[str, Any]:
        """The first facts that pass."""
        until = time.monotonic() + timeout_s
        while not test(facts := self.facts()):
            assert time.monotonic() < until, f"{timeout_s} s passed without {what}: {facts}"
            time.sleep(0.5)
        return facts

    def end(self, timeout_s: float = 180) -> dict[str, Any]:
        facts = self.wait(lambda facts: facts["state"] in ("done", "failed", "stopped"), "an end", timeout_s)
        assert facts["state"] == "done", facts
        return facts

    def pods(self) -> list[Object]:
        return pods_of(self.cluster.api, self.run_id)

    def running(self, component: str = "node") -> list[Object]:
        """Its running pods that train, by index and name; or the `head` of its Ray cluster."""
        found = [pod for pod in self.pods() if is_running(pod) and pod["metadata"]["labels"][COMPONENT] == component]
        return sorted(found, key=lambda pod: (index_of(pod), pod["metadata"]["name"]))

    def evict(self, pod: Object) -> None:
        """Ask for its end as a drain does: with its grace period, and heeding disruption budgets."""
        name = pod["metadata"]["name"]
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
        self.cluster.api.call(Request("POST", POD.path(self.cluster.api.namespace, name, "eviction"), body=body))

    def pull(self) -> Path:
        """The run's folder, which comes here."""
        answer = self.verb("pull", "--to", str(self.cli.cwd / "pulled"), "--json")
        assert answer.code == 0, answer.err
        return Path(answer.json()["folder"])

    def weights(self) -> str:
        """By the run's own record."""
        result = json.loads((self.pull() / "result.json").read_text())
        assert result["state"] == "done"
        return result["weights_sha256"]

    def computed_twice(self) -> list[int]:
        """Steps that one attempt computed and a later one again, because the first had not saved them."""
        text = (self.pull() / "events" / "rank_0.jsonl").read_text()
        steps = Counter(event["step"] for event in map(json.loads, text.splitlines()) if event["kind"] == "step")
        return [step for step, times in steps.items() if times > 1]


def processes_of(pod: Object, words: tuple[str, ...]) -> list[int]:
    """Those of a pod that runs on this very machine whose command line has these words; empty where it is elsewhere."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            told = path.read_bytes().decode(errors="replace").split("\0")
            here = pod["metadata"]["uid"] in (path.parent / "cgroup").read_text().replace("_", "-")
            found += [int(path.parent.name)] if here and set(words) <= set(told) else []
    return found
