"""What every pod of every kind keeps to, whatever the run."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from profiles import CODE, KINDS, PROFILES, RUN, SHARDS, STORED, pods_of, profile, spec_of

from orchestrator.cluster.job import END_S
from orchestrator.cluster.kubernetes.mounts import MIB
from orchestrator.cluster.kubernetes.render import render
from orchestrator.cluster.kubernetes.templates import to_yaml
from orchestrator.options import JobKind

EVERY = [*((name, kind) for name in PROFILES for kind in KINDS), (SHARDS, JobKind.job), (STORED, JobKind.job)]
ALLOWED_VOLUMES = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "secret"}
"""Of those that the level `restricted` allows."""
UNITS = {"Mi": MIB, "m": 1e-3}


def pods(name: str, kind: JobKind) -> list[dict[str, Any]]:
    return [pod for obj in render(profile(name), kind) for pod in pods_of(obj)]


def amount(quantity: str) -> float:
    unit = re.sub(r"[\d.]", "", quantity)
    return float(quantity.removesuffix(unit)) * UNITS.get(unit, 1)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_pods_meet_the_level_restricted(name: str, kind: JobKind):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    for pod in pods(name, kind):
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(spec)
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= ALLOWED_VOLUMES
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert "ports" not in container
            own = container["securityContext"]
            rdma = "rdma/hca" in container["resources"]["limits"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if rdma else {})}
            assert own["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_pods_hold_no_token_and_know_no_services(name: str, kind: JobKind):
    for pod in pods(name, kind):
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_images_are_named_by_digest(name: str, kind: JobKind):
    for pod in pods(name, kind):
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", container["image"])


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_shared_memory_is_sized_and_counted_in_the_limit(name: str, kind: JobKind):
    gib = {"cpu2": 4, "gpu_queue_spot_rdma": 8 * 32, "archive_secrets_volumes": 4, SHARDS: 2 * 4, STORED: 4}[name]
    for pod in pods(name, kind):
        spec = pod["spec"]
        shm = next(volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm")
        assert shm["medium"] == "Memory"
        assert amount(shm["sizeLimit"]) >= 64 * MIB
        limits = spec["containers"][0]["resources"]["limits"]
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] in ("node", "shards"):
            assert amount(limits["memory"]) == gib * 1024 * MIB + amount(shm["sizeLimit"])
        assert {"name": "shm", "mountPath": "/dev/shm"} in spec["containers"][0]["volumeMounts"]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_requests_are_limits_but_for_the_cpu(name: str, kind: JobKind):
    for pod in pods(name, kind):
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert {key: value for key, value in requests.items() if key != "cpu"} == limits
            assert {"memory", "ephemeral-storage"} <= set(limits)
            assert amount(requests["cpu"]) > 0


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_pods_get_the_grace_period_and_leave_lost_nodes(name: str, kind: JobKind):
    spec = profile(name)
    for pod in pods(name, kind):
        assert pod["spec"]["terminationGracePeriodSeconds"] == spec.grace_s + END_S >= 45
        lost = {one["key"]: one for one in pod["spec"]["tolerations"] if "tolerationSeconds" in one}
        assert set(lost) == {"node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"}
        assert {one["tolerationSeconds"] for one in lost.values()} == {spec.lost_node_s}


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_names_and_mounts_are_unique_and_valid(name: str, kind: JobKind):
    for pod in pods(name, kind):
        spec = pod["spec"]
        volumes = [volume["name"] for volume in spec["volumes"]]
        assert len(set(volumes)) == len(volumes)
        assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", volume) for volume in volumes)
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(paths)) == len(paths)
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
            variables = [variable["name"] for variable in container["env"]]
            assert len(set(variables)) == len(variables)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_every_object_is_found_by_its_run(name: str, kind: JobKind):
    labels = {"app.kubernetes.io/name": "orchestrator", "orchestrator/run": RUN}
    objects = render(profile(name), kind)
    for node in [*objects, *pods(name, kind)]:
        assert labels.items() <= node["metadata"]["labels"].items()
    assert objects[-1]["metadata"]["name"] == RUN
    assert objects[-1]["metadata"]["annotations"]["orchestrator/code"] == CODE


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_secrets_are_files_that_others_cannot_read_and_never_values(kind: JobKind):
    text = to_yaml(render(spec_of(*PROFILES["archive_secrets_volumes"]), kind))
    assert not re.search(r"secretKeyRef|envFrom|secretRef", text)
    mounted = [
        volume["secret"]
        for obj in yaml.safe_load_all(text)
        for pod in pods_of(obj)
        for volume in pod["spec"]["volumes"]
        if "secret" in volume
    ]
    assert {one["secretName"] for one in mounted} == {"wandb", "store"}
    for secret in mounted:
        assert secret["defaultMode"] == 0o440
        assert len(secret["items"]) == 1, "no other key of the secret reaches the pod"


def test_the_submitter_of_a_rayjob_gets_no_secret_and_no_claim():
    pod = next(
        pod
        for pod in pods("archive_secrets_volumes", JobKind.rayjob)
        if pod["spec"]["containers"][0]["name"] == "ray-job-submitter"
    )
    assert not any("secret" in volume or "persistentVolumeClaim" in volume for volume in pod["spec"]["volumes"])


def test_a_ray_cluster_asks_for_a_token_and_is_not_reachable_from_outside():
    cluster = render(profile("cpu2"), JobKind.rayjob)[-1]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_only_pods_of_the_same_run_are_let_in(kind: JobKind):
    policy = next(obj for obj in render(profile("cpu2"), kind) if obj["kind"] == "NetworkPolicy")["spec"]
    run = {"matchLabels": {"orchestrator/run": RUN}}
    assert policy["podSelector"] == run
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["ingress"][0] == {"from": [{"podSelector": run}]}
    operator = {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}
    others = [peer.get("podSelector") for rule in policy["ingress"][1:] for peer in rule["from"]]
    assert others == ([operator] if kind is JobKind.rayjob else [])
