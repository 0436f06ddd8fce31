"""A run, its job as data and a fake dashboard for the tests of Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_ray import FakeRay, serving

from orchestrator.bundle import Bundle, freeze
from orchestrator.cluster.job import JobSpec, job_of
from orchestrator.cluster.ray.api import Dashboard, Token
from orchestrator.compose import Composed, compose

OVERRIDES = ("cluster=ray", "data=synthetic", "data.train=/data/train", "data.val=/data/val", "cluster.code=image")


@pytest.fixture
def ray() -> Iterator[FakeRay]:
    with serving(FakeRay()) as fake:
        yield fake


@pytest.fixture
def dashboard(ray: FakeRay) -> Dashboard:
    return Dashboard(ray.address, Token("secret-token", "test"))


@pytest.fixture(scope="session")
def composed() -> Composed:
    return compose([*OVERRIDES, "compute=cpu2", "runs_dir=/runs"])


@pytest.fixture
def bundle(composed: Composed, tmp_path: Path) -> Bundle:
    """A run whose folder is the test's own."""
    return freeze(replace(composed, config=replace(composed.config, runs_dir=str(tmp_path / "runs"))))


@pytest.fixture
def spec(bundle: Bundle) -> JobSpec:
    return job_of(bundle, None)


@pytest.fixture
def spec_with(composed: Composed, tmp_path: Path) -> Callable[..., JobSpec]:
    """The same with other keys of `cluster` or `tracking`."""

    def make(archive_digest: str | None = None, **groups: dict[str, object]) -> JobSpec:
        config = replace(composed.config, runs_dir=str(tmp_path / "runs"))
        for group, changes in groups.items():
            config = replace(config, **{group: replace(getattr(config, group), **changes)})
        return job_of(freeze(replace(composed, config=config)), archive_digest)

    return make
