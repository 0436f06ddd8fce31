"""Every manifest is valid for the API server and for two versions of each operator, without an unknown field."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from profiles import KINDS, PROFILES, SHARDS, STORED, pods_of, profile
from schemas import check_built_in, check_defined

from orchestrator.cluster.kubernetes.render import code_config_map, render
from orchestrator.options import JobKind

K8S = Path(__file__).parents[3] / "k8s"
EVERY = [*((name, kind) for name in PROFILES for kind in KINDS), (SHARDS, JobKind.job), (STORED, JobKind.job)]


@pytest.fixture(params=["rig", "newest"])
def crds(request: pytest.FixtureRequest, shared_data: Path) -> Path:
    folder = shared_data / "crds" / request.param
    if not folder.is_dir():
        pytest.skip(f"no definitions of the operators' kinds at {folder}: their manifests are NOT checked")
    return folder


@pytest.mark.parametrize("version", ["1.32", "1.37"])
@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_built_in_objects_are_valid(name: str, kind: JobKind, version: str):
    checked = [check_built_in(obj, version) for obj in render(profile(name), kind)]
    assert sum(checked) >= 2, "the run's ConfigMap and NetworkPolicy at least"


@pytest.mark.parametrize(("name", "kind"), [pair for pair in EVERY if pair[1] is not JobKind.job])
def test_objects_of_operators_are_valid(name: str, kind: JobKind, crds: Path):
    theirs = [obj for obj in render(profile(name), kind) if not check_built_in(obj)]
    assert theirs
    for obj in theirs:
        check_defined(obj, crds)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_pods_of_operators_are_valid_for_the_api_server(kind: JobKind):
    """A definition may be older than the cluster, whose own schema of a pod counts in the end."""
    pods = [pod for obj in render(profile("gpu_queue_spot_rdma"), kind) for pod in pods_of(obj)]
    assert len(pods) == (3 if kind is JobKind.rayjob else 1)
    for pod in pods:
        spec = {"containers": [{**one, "command": ["x"]} for one in pod["spec"]["containers"]]}
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **pod["metadata"]}}
        assert check_built_in({**whole, "spec": {**pod["spec"], **spec}})


def test_the_code_s_config_map_is_valid():
    assert check_built_in(code_config_map(profile("archive_secrets_volumes"), b"code"))


@pytest.mark.parametrize("path", sorted(K8S.glob("[!t]*/**/*.yaml")), ids=lambda path: str(path.relative_to(K8S)))
def test_what_an_administrator_applies_is_valid(path: Path, shared_data: Path):
    for obj in yaml.safe_load_all(path.read_text()):
        if obj["kind"] != "Kustomization" and not check_built_in(obj):
            check_defined(obj, shared_data / "crds" / "rig")


@pytest.mark.parametrize(("kind", "path"), [
    (JobKind.job, ["spec", "template", "spec", "tolerations", 0]),
    (JobKind.jobset, ["spec", "failurePolicy"]),
    (JobKind.jobset, ["spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0]),
    (JobKind.trainjob, ["spec", "runtimeRef"]),
    (JobKind.rayjob, ["spec", "rayClusterSpec", "headGroupSpec"]),
    (JobKind.rayjob, ["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "volumes", 0]),
])  # fmt: skip
def test_a_misspelt_field_is_found(kind: JobKind, path: list[Any], crds: Path):
    broken = copy.deepcopy(render(profile("cpu2"), kind)[-1])
    node = broken
    for key in path:
        node = node[key]
    node["misspelt"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        check_built_in(broken) or check_defined(broken, crds)
