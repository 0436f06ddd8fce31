"""Each slot holds the value of the job that it is for, and each kind does what it can of what was asked for."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from profiles import ARCHIVE, CODE, CONFIG, IMAGE, KINDS, PROFILES, RUN, pods_of, profile, spec_of

from orchestrator.bundle import load_bundle
from orchestrator.cluster.job import JobSpec, SecretFile
from orchestrator.cluster.kubernetes.mounts import bytes_of
from orchestrator.cluster.kubernetes.pod import cpus_of
from orchestrator.cluster.kubernetes.render import code_config_map, remarks, render
from orchestrator.cluster.kubernetes.templates import template, templates_dir
from orchestrator.errors import ConfigError
from orchestrator.options import JobKind, Spread

JOB, JOBSET, TRAINJOB, RAYJOB = JobKind.job, JobKind.jobset, JobKind.trainjob, JobKind.rayjob
SET = "spec.replicatedJobs.0.template.spec"
LABELS = {"app.kubernetes.io/name": "orchestrator", "orchestrator/run": RUN}
QUEUED = {**LABELS, "kueue.x-k8s.io/queue-name": "q"}
MADE_FROM = {"orchestrator/config": CONFIG, "orchestrator/code": CODE}
NODE = {"orchestrator/run": RUN, "app.kubernetes.io/component": "node"}
POD = "spec.template.spec"

# slot, kind, object, path, what is changed in the job, what stands there then
SLOTS: list[tuple[str, JobKind, str, str, dict[str, Any], Any]] = [
    ("job.name", JOB, "Job", "metadata.name", {}, RUN),
    ("job.labels", JOB, "Job", "metadata.labels", {"queue": "q", "priority": "p"},
     {**LABELS, "kueue.x-k8s.io/queue-name": "q", "kueue.x-k8s.io/priority-class": "p"}),
    ("job.annotations", JOB, "Job", "metadata.annotations", {"start_deadline_s": 90.0},
     {**MADE_FROM, "orchestrator/start-deadline-s": "90"}),
    ("job.suspend", JOB, "Job", "spec.suspend", {"queue": "q"}, True),
    ("job.suspend", JOB, "Job", "spec.suspend", {}, False),
    ("job.num_nodes", JOB, "Job", "spec.completions", {"num_nodes": 3}, 3),
    ("job.num_nodes", JOB, "Job", "spec.parallelism", {"num_nodes": 3}, 3),
    ("job.backoff_limit", JOB, "Job", "spec.backoffLimit", {"num_nodes": 3, "max_restarts": 5}, 15),
    ("job.pod_rules", JOB, "Job", "spec.podFailurePolicy.rules.0.onExitCodes.values", {}, [42, 43, 45]),
    ("job.deadline_s", JOB, "Job", "spec.activeDeadlineSeconds", {"deadline_s": 12.3}, 13),
    ("job.deadline_s", JOB, "Job", "spec.activeDeadlineSeconds", {"deadline_s": 0.0}, None),
    ("job.ttl_s", JOB, "Job", "spec.ttlSecondsAfterFinished", {"ttl_s": 60.0}, 60),
    ("job.ttl_s", JOB, "Job", "spec.ttlSecondsAfterFinished", {"ttl_s": 0.0}, None),
    ("job.pod", JOB, "Job", "spec.template.metadata.labels", {}, {**LABELS, **NODE}),
    ("jobset.name", JOBSET, "JobSet", "metadata.name", {}, RUN),
    ("jobset.labels", JOBSET, "JobSet", "metadata.labels", {"queue": "q"}, QUEUED),
    ("jobset.annotations", JOBSET, "JobSet", "metadata.annotations", {"start_deadline_s": 0.0}, MADE_FROM),
    ("jobset.jobset", JOBSET, "JobSet", "spec.network.publishNotReadyAddresses", {}, True),
    ("jobset_spec.suspend", JOBSET, "JobSet", "spec.suspend", {"queue": "q"}, True),
    ("jobset_spec.ttl_s", JOBSET, "JobSet", "spec.ttlSecondsAfterFinished", {"ttl_s": 60.0}, 60),
    ("jobset_spec.max_restarts", JOBSET, "JobSet", "spec.failurePolicy.maxRestarts", {"max_restarts": 5}, 5),
    ("jobset_spec.set_rules", JOBSET, "JobSet", "spec.failurePolicy.rules.0.action", {}, "FailJobSet"),
    ("jobset_spec.role", JOBSET, "JobSet", "spec.replicatedJobs.0.name", {}, "node"),
    ("jobset_spec.replicas", JOBSET, "JobSet", "spec.replicatedJobs.0.replicas", {"num_nodes": 3}, 1),
    ("jobset_spec.job_labels", TRAINJOB, "TrainingRuntime",
     f"spec.template.{SET.removesuffix('.spec')}.metadata.labels", {},
     {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}),
    ("jobset_spec.num_nodes", JOBSET, "JobSet", f"{SET}.completions", {"num_nodes": 3}, 3),
    ("jobset_spec.num_nodes", JOBSET, "JobSet", f"{SET}.parallelism", {"num_nodes": 3}, 3),
    ("jobset_spec.backoff_limit", JOBSET, "JobSet", f"{SET}.backoffLimit", {"max_restarts": 5}, 0),
    ("jobset_spec.pod_rules", JOBSET, "JobSet", f"{SET}.podFailurePolicy.rules.1.action", {}, "FailJob"),
    ("jobset_spec.deadline_s", JOBSET, "JobSet", f"{SET}.activeDeadlineSeconds", {"deadline_s": 60.0}, 60),
    ("jobset_spec.pod", JOBSET, "JobSet", f"{SET}.template.metadata.labels", {}, {**LABELS, **NODE}),
    ("runtime.name", TRAINJOB, "TrainingRuntime", "metadata.name", {}, RUN),
    ("runtime.labels", TRAINJOB, "TrainingRuntime", "spec.template.metadata.labels", {"queue": "q"}, LABELS),
    ("runtime.annotations", TRAINJOB, "TrainingRuntime", "spec.template.metadata.annotations",
     {"start_deadline_s": 0.0}, MADE_FROM),
    ("runtime.num_nodes", TRAINJOB, "TrainingRuntime", "spec.mlPolicy.numNodes", {"num_nodes": 3}, 3),
    ("runtime.jobset", TRAINJOB, "TrainingRuntime", "spec.template.spec.suspend", {"queue": "q"}, None),
    ("runtime.jobset", TRAINJOB, "TrainingRuntime", "spec.template.spec.ttlSecondsAfterFinished", {"ttl_s": 60.0},
     None),
    ("trainjob.name", TRAINJOB, "TrainJob", "metadata.name", {}, RUN),
    ("trainjob.name", TRAINJOB, "TrainJob", "spec.runtimeRef.name", {}, RUN),
    ("trainjob.labels", TRAINJOB, "TrainJob", "metadata.labels", {"queue": "q", "priority": "p"}, LABELS),
    ("trainjob.annotations", TRAINJOB, "TrainJob", "metadata.annotations", {"start_deadline_s": 0.0}, MADE_FROM),
    ("trainjob.suspend", TRAINJOB, "TrainJob", "spec.suspend", {"queue": "q"}, False),
    ("trainjob.num_nodes", TRAINJOB, "TrainJob", "spec.trainer.numNodes", {"num_nodes": 3}, 3),
    ("rayjob.name", RAYJOB, "RayJob", "metadata.name", {}, RUN),
    ("rayjob.labels", RAYJOB, "RayJob", "metadata.labels", {"queue": "q"}, QUEUED),
    ("rayjob.annotations", RAYJOB, "RayJob", "metadata.annotations", {"start_deadline_s": 0.0}, MADE_FROM),
    ("rayjob.suspend", RAYJOB, "RayJob", "spec.suspend", {"queue": "q"}, True),
    ("rayjob.entrypoint", RAYJOB, "RayJob", "spec.entrypoint", {"python": "/opt/p"},
     "exec /opt/p -m jobs.ray_driver /etc/orchestrator/run/run.json"),
    ("rayjob.backoff_limit", RAYJOB, "RayJob", "spec.backoffLimit", {"max_restarts": 5}, 5),
    ("rayjob.deadline_s", RAYJOB, "RayJob", "spec.activeDeadlineSeconds", {"deadline_s": 60.0}, 60),
    ("rayjob.ray_version", RAYJOB, "RayJob", "spec.rayClusterSpec.rayVersion", {}, "2.60.0"),
    ("rayjob.head_params", RAYJOB, "RayJob", "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", {}, "0"),
    ("rayjob.num_nodes", RAYJOB, "RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.replicas", {"num_nodes": 3}, 3),
    ("rayjob.num_nodes", RAYJOB, "RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", {"num_nodes": 3}, 3),
    ("rayjob.worker_params", RAYJOB, "RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.rayStartParams.num-cpus",
     {"processes_per_node": 4}, "4"),
    *[(f"rayjob.{part}_pod", RAYJOB, "RayJob", f"spec.{where}.metadata.labels", {},
       {**LABELS, "app.kubernetes.io/component": component})
      for part, component, where in (
          ("submitter", "submitter", "submitterPodTemplate"),
          ("head", "head", "rayClusterSpec.headGroupSpec.template"),
          ("worker", "node", "rayClusterSpec.workerGroupSpecs.0.template"))],
    ("service.name", JOB, "Service", "metadata.name", {}, RUN),
    ("service.labels", JOB, "Service", "metadata.labels", {}, LABELS),
    ("service.selector", JOB, "Service", "spec.selector", {}, NODE),
    ("network_policy.name", JOB, "NetworkPolicy", "metadata.name", {}, RUN),
    ("network_policy.labels", JOB, "NetworkPolicy", "metadata.labels", {}, LABELS),
    ("network_policy.selector", JOB, "NetworkPolicy", "spec.podSelector.matchLabels", {}, {"orchestrator/run": RUN}),
    ("network_policy.operator", RAYJOB, "NetworkPolicy", "spec.ingress.1.from.0.namespaceSelector", {}, {}),
    ("run_config_map.name", JOB, "ConfigMap", "metadata.name", {}, f"run-{RUN}"),
    ("run_config_map.labels", JOB, "ConfigMap", "metadata.labels", {}, LABELS),
    ("run_config_map.run_json", JOB, "ConfigMap", "data", {"bundle": {"config_hash": "x"}},
     {"run.json": '{\n "config_hash": "x"\n}\n'}),
    ("pod.labels", JOB, "Job", "spec.template.metadata.labels", {}, {**LABELS, **NODE}),
    ("pod.annotations", JOB, "Job", "spec.template.metadata.annotations", {"archive_digest": ARCHIVE},
     {**MADE_FROM, "orchestrator/archive": ARCHIVE}),
    ("pod.subdomain", JOB, "Job", f"{POD}.subdomain", {}, RUN),
    ("pod.subdomain", JOBSET, "JobSet", f"{SET}.template.spec.subdomain", {}, None),
    ("pod.service_account", JOB, "Job", f"{POD}.serviceAccountName", {"service_account": "runner"}, "runner"),
    ("pod.priority_class", JOB, "Job", f"{POD}.priorityClassName", {"priority": "p"}, "p"),
    ("pod.priority_class", JOB, "Job", f"{POD}.priorityClassName", {"priority": "p", "queue": "q"}, None),
    ("pod.grace_s", JOB, "Job", f"{POD}.terminationGracePeriodSeconds", {"grace_s": 77.2}, 93),
    ("pod.pull_secrets", JOB, "Job", f"{POD}.imagePullSecrets", {"pull_secrets": ("a", "b")},
     [{"name": "a"}, {"name": "b"}]),
    ("pod.node_selector", JOB, "Job", f"{POD}.nodeSelector", {"node_selector": {"pool": "a100"}}, {"pool": "a100"}),
    ("pod.affinity", JOB, "Job",
     f"{POD}.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution.0.topologyKey",
     {"spread": Spread.pack, "topology": "zone"}, "zone"),
    ("pod.affinity", JOB, "Job",
     f"{POD}.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms.0.matchFields",
     {"avoid_nodes": ("a", "b")}, [{"key": "metadata.name", "operator": "NotIn", "values": [n]} for n in ("a", "b")]),
    ("pod.affinity", JOB, "Job", f"{POD}.affinity", {"spread": Spread.any}, None),
    ("pod.spread", JOB, "Job", f"{POD}.topologySpreadConstraints.0.topologyKey",
     {"spread": Spread.spread, "topology": "zone"}, "zone"),
    ("pod.spread", JOB, "Job", f"{POD}.topologySpreadConstraints", {"spread": Spread.pack}, None),
    ("pod.tolerations", JOB, "Job", f"{POD}.tolerations.0.tolerationSeconds", {"lost_node_s": 5.0}, 5),
    ("pod.tolerations", JOB, "Job", f"{POD}.tolerations.2", {"tolerations": ("k=v:NoExecute",)},
     {"key": "k", "operator": "Equal", "value": "v", "effect": "NoExecute"}),
    ("pod.tolerations", JOB, "Job", f"{POD}.tolerations.2", {"tolerations": ("a/k:NoSchedule",)},
     {"key": "a/k", "operator": "Exists", "effect": "NoSchedule"}),
    *[("pod.user_id", JOB, "Job", f"{POD}.securityContext.{key}", {"user_id": 7}, 7)
      for key in ("runAsUser", "runAsGroup", "fsGroup")],
    ("pod.init_containers", JOB, "Job", f"{POD}.initContainers", {}, None),
    ("pod.init_containers", JOB, "Job", f"{POD}.initContainers.0.name", {"archive_digest": ARCHIVE}, "unpack-code"),
    ("pod.container", JOB, "Job", f"{POD}.containers.0.name", {}, "node"),
    ("pod.image", JOB, "Job", f"{POD}.containers.0.image", {"image": "i@sha256:0"}, "i@sha256:0"),
    ("pod.command", JOB, "Job", f"{POD}.containers.0.command", {"command": ("p", "-m", "$(x)")}, ["p", "-m", "$$(x)"]),
    ("pod.home", JOB, "Job", f"{POD}.containers.0.workingDir", {}, "/home/user"),
    ("pod.env", JOB, "Job", f"{POD}.containers.0.env.7", {"env": {"A": "$(B) ${C}"}},
     {"name": "A", "value": "$$(B) ${C}"}),
    ("pod.resources", JOB, "Job", f"{POD}.containers.0.resources.requests.cpu", {}, "1"),
    ("pod.pre_stop", JOB, "Job", f"{POD}.containers.0.lifecycle", {}, None),
    ("pod.pre_stop", RAYJOB, "RayJob",
     "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.lifecycle.preStop.exec.command.2", {},
     "jobs.ray_driver"),
    ("pod.termination_log", JOB, "Job", f"{POD}.containers.0.terminationMessagePath", {}, "/dev/termination-log"),
    ("pod.container_security", JOB, "Job", f"{POD}.containers.0.securityContext.capabilities", {}, {"drop": ["ALL"]}),
    ("pod.mounts", JOB, "Job", f"{POD}.containers.0.volumeMounts.0.mountPath", {}, "/etc/orchestrator/run"),
    ("pod.volumes", JOB, "Job", f"{POD}.volumes.0.configMap.name", {}, f"run-{RUN}"),
    *[(f"unpack.{slot}", JOB, "Job", f"{POD}.initContainers.0.{path}", {"archive_digest": ARCHIVE}, value)
      for slot, path, value in (
          ("image", "image", IMAGE), ("command", "command.1", "-I"), ("command", "command.5", ARCHIVE),
          ("resources", "resources.requests.cpu", "1"),
          ("container_security", "securityContext.capabilities.drop", ["ALL"]),
          ("archive_folder", "volumeMounts.0.mountPath", "/etc/orchestrator/archive"),
          ("code_folder", "volumeMounts.1.mountPath", "/opt/orchestrator/code"))],
    *[(f"fetch.{slot}", JOB, "Job", f"{POD}.initContainers.0.{path}",
       {"archive_digest": ARCHIVE, "archive_url": "s3://b/c", "env": {"A": "b"},
        "secrets": (SecretFile("store", "name", "key"),)}, value)
      for slot, path, value in (
          ("image", "image", IMAGE), ("command", "command.5", "s3://b/c"), ("env", "env.0.name", "A"),
          ("resources", "resources.requests.cpu", "1"),
          ("container_security", "securityContext.capabilities.drop", ["ALL"]),
          ("archive_folder", "volumeMounts.0.mountPath", "/etc/orchestrator/archive"),
          ("keys", "volumeMounts.1.mountPath", "/etc/orchestrator/secrets/store"))],
]  # fmt: skip


def at(node: Any, path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    for key in path.split("."):
        if isinstance(node, list):
            node = node[int(key)] if int(key) < len(node) else None
        else:
            node = node.get(key) if isinstance(node, dict) else None
    return node


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(obj for obj in objects if obj["kind"] == kind)


def main_env(spec: JobSpec, kind: JobKind) -> dict[str, Any]:
    pod = [pod for obj in render(spec, kind) for pod in pods_of(obj)][-1]
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in pod["spec"]["containers"][0]["env"]}


@pytest.mark.parametrize(
    ("slot", "kind", "name", "path", "change", "expected"), SLOTS, ids=lambda value: str(value)[:40]
)
def test_a_slot_holds_its_value(slot: str, kind: JobKind, name: str, path: str, change: dict[str, Any], expected: Any):
    assert at(of_kind(render(replace(profile("cpu2"), **change), kind), name), path) == expected


def test_every_slot_has_such_a_case():
    every = {
        f"{path.stem}.{slot}"
        for path in templates_dir().glob("*.yaml")
        for slot in re.findall(r"\$\{(\w+)\}", path.read_text())
    }
    elsewhere = {
        "container_security.capabilities",
        "code_config_map.name",
        "code_config_map.labels",
        "code_config_map.archive",
    }
    assert every - elsewhere == {slot for slot, *_ in SLOTS}


def test_a_device_for_rdma_adds_the_capability_that_it_needs():
    assert template("container_security", capabilities=["IPC_LOCK"])["capabilities"]["add"] == ["IPC_LOCK"]


def test_the_code_is_an_immutable_object_of_no_run():
    found = code_config_map(profile("archive_secrets_volumes"), b"\x00code")
    assert found["metadata"] == {"name": "code-aaaaaaaaaaaa", "labels": {"app.kubernetes.io/name": "orchestrator"}}
    assert found["immutable"] is True
    assert base64.b64decode(found["binaryData"]["code.tar.gz"]) == b"\x00code"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_objects_come_in_the_order_of_creation(kind: JobKind):
    kinds = [obj["kind"] for obj in render(profile("archive_secrets_volumes"), kind, b"code")]
    own = {JOB: ["Service", "Job"], JOBSET: ["JobSet"], TRAINJOB: ["TrainingRuntime", "TrainJob"], RAYJOB: ["RayJob"]}
    assert kinds == ["ConfigMap", "ConfigMap", "NetworkPolicy", *own[kind]]


def test_the_run_in_a_pod_is_the_run_that_was_frozen(tmp_path: Path):
    spec = spec_of(*PROFILES["cpu2"])
    text = of_kind(render(spec, JOB), "ConfigMap")["data"]["run.json"]
    (tmp_path / "run.json").write_text(text)
    assert load_bundle(tmp_path / "run.json").run_id == spec.run_id


@pytest.mark.parametrize(("kind", "master"), [
    (JOB, f"{RUN}-0.{RUN}"), (JOBSET, f"{RUN}-node-0-0.{RUN}"), (TRAINJOB, f"{RUN}-node-0-0.{RUN}"),
])  # fmt: skip
def test_nodes_are_told_who_they_are_and_where_the_first_one_is(kind: JobKind, master: str):
    env = main_env(profile("archive_secrets_volumes"), kind)
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    assert env == {
        "MASTER_ADDR": master,
        "MASTER_PORT": "29500",
        "NUM_NODES": "2",
        "NODE_RANK": index,
        "HOME": "/home/user",
        "TERMINATION_LOG": "/dev/termination-log",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": "/opt/orchestrator/code",
        "PATH": "/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "OMP_NUM_THREADS": "1",
        "NCCL_DEBUG": "WARN",
    }


def test_a_claim_that_is_mounted_twice_is_one_volume():
    pod = next(pods_of(render(profile("archive_secrets_volumes"), JOB)[-1]))["spec"]
    claims = {
        one["name"]: one["persistentVolumeClaim"]["claimName"]
        for one in pod["volumes"]
        if "persistentVolumeClaim" in one
    }
    mounts = {
        one["mountPath"]: (claims[one["name"]], one.get("readOnly", False))
        for one in pod["containers"][0]["volumeMounts"]
        if one["name"] in claims
    }
    assert claims == {"claim-0": "work", "claim-1": "data"}
    assert mounts == {"/runs": ("work", False), "/home/user/.cache": ("work", False), "/data": ("data", True)}


@pytest.mark.parametrize(("profile_name", "kind", "said"), [
    ("cpu2", JOB, []),
    ("gpu_queue_spot_rdma", JOBSET, ["cluster.rdma = rdma/hca"]),
    ("gpu_queue_spot_rdma", TRAINJOB,
     ["cluster.queue = training: Kueue 0.10 knows no TrainJob", "cluster.ttl_s", "cluster.rdma"]),
    ("cpu2", RAYJOB, ["cluster.ttl_s = 604800: a rayjob has none"]),
])  # fmt: skip
def test_what_a_kind_cannot_do_is_said(profile_name: str, kind: JobKind, said: list[str]):
    found = remarks(profile(profile_name), kind)
    assert len(found) == len(said)
    assert all(sentence.startswith(begin) for sentence, begin in zip(found, said, strict=True))


def test_a_jobset_restarts_as_a_whole_by_the_table_of_exit_codes():
    """The rules of the set point at those of its Job by their places."""
    spec = render(profile("cpu2"), JOBSET)[-1]["spec"]
    rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    verdicts = {}
    for rule in spec["failurePolicy"]["rules"]:
        for pattern in rule.get("onJobFailureMessagePatterns", []):
            number = int(re.fullmatch(r"matching FailJob rule at index (\d)\$", pattern)[1])  # pyright: ignore[reportOptionalSubscript]
            verdicts[number] = rule["action"]
    assert [
        (verdicts[n], rule.get("onExitCodes", {}).get("values"), "onPodConditions" in rule)
        for n, rule in enumerate(rules)
    ] == [
        ("FailJobSet", [42, 43, 45], False),
        ("RestartJobSetAndIgnoreMaxRestarts", [143], False),
        ("RestartJobSetAndIgnoreMaxRestarts", None, True),
    ]


def test_a_job_replaces_pods_by_the_same_table():
    rules = render(profile("cpu2"), JOB)[-1]["spec"]["podFailurePolicy"]["rules"]
    assert [
        (rule["action"], rule.get("onExitCodes", {}).get("values"), "onPodConditions" in rule) for rule in rules
    ] == [
        ("FailJob", [42, 43, 45], False),
        ("Ignore", [143], False),
        ("Ignore", None, True),
    ]


def test_a_rayjob_of_an_unknown_version_is_refused():
    spec = replace(profile("cpu2"), bundle={"config_hash": "x", "versions": {"ray": "missing"}})
    with pytest.raises(ConfigError, match=r"cluster\.kind = rayjob: needs Ray"):
        render(spec, RAYJOB)


@pytest.mark.parametrize(
    ("count", "quantity"), [(1, "1Mi"), (1 << 20, "1Mi"), ((1 << 20) + 1, "2Mi"), (3 << 30, "3072Mi")]
)
def test_memory_is_rounded_up(count: int, quantity: str):
    assert bytes_of(count) == quantity


@pytest.mark.parametrize(("count", "quantity"), [(1.0, "1"), (7.5, "7500m"), (0.1 + 0.2, "300m"), (60.0, "60")])
def test_cpus_are_counted_in_thousandths(count: float, quantity: str):
    assert cpus_of(count) == quantity


def test_rendering_twice_gives_the_same_and_changes_nothing():
    spec = profile("archive_secrets_volumes")
    first = render(spec, JOBSET)
    first[-1]["spec"].clear()
    assert render(spec, JOBSET) == render(spec, JOBSET) != first
