"""A fake API server for each test, and the product's shell that talks to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_api import FakeApi, write_kubeconfig

from orchestrator.cluster.kubernetes import api as shell
from orchestrator.cluster.kubernetes import lifecycle
from orchestrator.cluster.kubernetes.api import Api


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    fake = FakeApi()
    write_kubeconfig(tmp_path / "kubeconfig", fake.url)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(shell, "PAUSES_S", (0.01, 0.02))
    monkeypatch.setattr(lifecycle, "NOTED_S", 0.02)  # nobody plays Kueue
    yield fake
    fake.close()


@pytest.fixture
def api(server: FakeApi) -> Api:
    return shell.connect()
