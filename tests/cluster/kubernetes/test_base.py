"""What an administrator applies: least rights, no wildcard, and one environment for the workers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).parents[3] / "k8s"
RUN = "create delete get list patch"
SUBMITTER = {
    "batch/jobs": RUN,
    "jobset.x-k8s.io/jobsets": RUN,
    "trainer.kubeflow.org/trainjobs": RUN,
    "ray.io/rayjobs": RUN,
    "/configmaps": "create delete get",
    "/services": "create delete get",
    "networking.k8s.io/networkpolicies": "create delete get",
    "trainer.kubeflow.org/trainingruntimes": "create delete get",
    "/pods": "delete get list patch watch",
    "/pods/log": "get",
    "/events": "list",
    "/persistentvolumeclaims": "get list",
    "kueue.x-k8s.io/localqueues": "get list",
    "kueue.x-k8s.io/workloads": "list patch",
}
READER = {
    "/nodes": "list",
    "/pods": "list",
    "/namespaces": "get",
    "/resourcequotas": "list",
    "/limitranges": "list",
    "storage.k8s.io/storageclasses": "list",
    "scheduling.k8s.io/priorityclasses": "get list",
    "kueue.x-k8s.io/clusterqueues": "list",
    "kueue.x-k8s.io/resourceflavors": "list",
    "kueue.x-k8s.io/workloadpriorityclasses": "get list",
    "kueue.x-k8s.io/workloads": "list",
}


def load(path: str) -> dict[str, Any]:
    return yaml.safe_load((K8S / path).read_text())


def rights(role: dict[str, Any]) -> dict[str, str]:
    found = {}
    for rule in role["rules"]:
        assert set(rule) == {"apiGroups", "resources", "verbs"}
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                assert f"{group}/{resource}" not in found, "a right stands once"
                found[f"{group}/{resource}"] = " ".join(sorted(rule["verbs"]))
    return found


def test_the_submitter_may_do_what_the_verbs_need_and_nothing_else():
    role = load("base/submitter_role.yaml")
    assert role["kind"] == "Role", "in one namespace"
    assert rights(role) == SUBMITTER
    assert not re.search(r"\*|secrets|exec", yaml.safe_dump(role))


def test_the_reader_only_reads():
    assert rights(load("reader/cluster_role.yaml")) == READER


def test_the_namespace_refuses_pods_that_are_not_restricted():
    labels = load("base/namespace.yaml")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_nothing_reaches_a_run_unless_its_own_policy_says_so():
    spec = load("base/network_policy.yaml")["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    assert "ingress" not in spec


@pytest.mark.parametrize("folder", ["base", "reader", "overlays/example"])
def test_every_file_of_a_folder_is_applied(folder: str):
    files = {path.name for path in (K8S / folder).glob("*.yaml")} - {"kustomization.yaml"}
    resources = load(f"{folder}/kustomization.yaml")["resources"]
    assert files == {name for name in resources if "/" not in name}
    for name in resources:
        assert (K8S / folder / name).exists()


@pytest.mark.parametrize("folder", ["base", "reader", "overlays/example"])
def test_kustomize_puts_them_together(folder: str):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not on the path: kustomize is NOT run")
    done = subprocess.run([kubectl, "kustomize", str(K8S / folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    assert all(obj["metadata"].get("namespace", "training") == "training" for obj in objects)


def test_the_image_is_built_from_a_digest_with_hashes_for_a_user():
    text = (K8S / "image" / "Dockerfile").read_text()
    assert re.findall(r"(?m)^ARG .*", text) == ["ARG BASE"], "without a default: a digest that nobody pulled is a guess"
    assert set(re.findall(r"(?m)^FROM (\S+)", text)) == {"${BASE}"}
    installs = re.findall(r"(?:pip install|pip sync)[^\n]*", text)
    assert len(installs) == 2
    assert all("--require-hashes" in command for command in installs)
    assert re.findall(r"(?m)^USER (\S+)", text) == ["1000:1000"]


def test_hadolint_finds_nothing_in_the_image():
    hadolint = shutil.which("hadolint", path=str(Path(__file__).parents[3] / ".venv" / "bin")) or shutil.which(
        "hadolint"
    )
    if hadolint is None:
        pytest.skip("hadolint is not installed: the Dockerfile is NOT linted")
    done = subprocess.run([hadolint, str(K8S / "image" / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
