"""Manifests are what they were: one file for each kind and profile. `make golden` writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from profiles import KINDS, PROFILES, SHARDS, profile

from orchestrator.cluster.kubernetes.render import render
from orchestrator.cluster.kubernetes.templates import to_yaml
from orchestrator.options import JobKind

GOLDEN = Path(__file__).parent / "golden"
EVERY = [*((name, kind) for name in PROFILES for kind in KINDS), (SHARDS, JobKind.job)]


@pytest.mark.parametrize(("name", "kind"), EVERY, ids=lambda one: getattr(one, "name", one))
def test_a_manifest_is_what_it_was(kind: JobKind, name: str):
    path, found = GOLDEN / f"{name}.{kind.name}.yaml", to_yaml(render(profile(name), kind))
    if os.environ.get("REWRITE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text(), f"{path.name}: if the change is meant, `make golden` and read the difference"


@pytest.mark.parametrize(("name", "kind"), EVERY, ids=lambda one: getattr(one, "name", one))
def test_what_is_printed_is_what_is_sent(kind: JobKind, name: str):
    objects = render(profile(name), kind)
    assert list(yaml.safe_load_all(to_yaml(objects))) == objects


def test_there_is_no_golden_file_of_nothing():
    wanted = {f"{name}.{kind.name}.yaml" for name, kind in EVERY}
    assert {path.name for path in GOLDEN.glob("*.yaml")} == wanted
