"""Two nodes with networks of their own, as pods have them: another interface than `lo`, and a cable that can be cut."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from launching import REPO, Run, environment, wait_for

from orchestrator.bundle import freeze, write_bundle
from orchestrator.compose import compose

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ADDRESS = "10.214.77.{}"
SECONDS = 20.0
"""In which both ends of a cut cable are gone; silence is judged after 8 s."""


@pytest.fixture
def networks() -> Iterator[list[str]]:
    """Two network namespaces with a cable between their `eth0`."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    names = [f"node-{secrets.token_hex(2)}-{number}" for number in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ends = ("eth0", "netns", names[0]), ("eth0", "netns", names[1])
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESS.format(number + 1)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error.stderr!r}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def start(names: list[str], bundle: Path) -> list[subprocess.Popen[bytes]]:
    launchers = []
    for number, name in enumerate(names):
        variables = {
            "NODE_RANK": str(number),
            "NUM_NODES": "2",
            "MASTER_ADDR": ADDRESS.format(1),
            "MASTER_PORT": "29500",
            "TERMINATION_LOG": str(bundle.with_name(f"last_words_{number}")),
        }
        with open(bundle.with_name(f"out_{number}"), "ab") as out:
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "jobs.node", str(bundle)]
            env = {**environment([]), **variables}
            launchers.append(subprocess.Popen(command, stdout=out, stderr=out, cwd=REPO, env=env))
    return launchers


def test_a_cut_cable_ends_both_nodes_and_the_next_lives_end_with_the_local_bits(
    networks: list[str], trained: Run, small: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = [*small, "recipe.ema_decay=0.9", "checkpointing.every_steps=2", "compute.num_nodes=2"]
    bundle = freeze(compose([*overrides, f"runs_dir={tmp_path}/runs"]))
    write_bundle(bundle, tmp_path / "run.json", {})
    events = bundle.folder / "events" / "rank_0.jsonl"
    launchers = start(networks, tmp_path / "run.json")
    try:
        wait_for(lambda: events.exists() and '"save"' in events.read_text(), "a save", 120)
        ip("-n", networks[0], "link", "set", "eth0", "down")
        cut = time.monotonic()
        assert [launcher.wait(60) for launcher in launchers] == [75, 75]
        assert time.monotonic() - cut < SECONDS
        for number in (0, 1):
            words = json.loads((tmp_path / f"last_words_{number}").read_text())
            assert words["error"].startswith(f"node {1 - number} is gone: silent for ")
        ip("-n", networks[0], "link", "set", "eth0", "up")
        launchers += start(networks, tmp_path / "run.json")
        assert [launcher.wait(120) for launcher in launchers[2:]] == [0, 0]
    finally:
        for launcher in launchers:
            with suppress(ProcessLookupError):
                launcher.kill()
            launcher.wait()
    result = json.loads((bundle.folder / "result.json").read_text())
    for key in ("state", "step", "weights_sha256", "state_sha256", "metrics", "world_size"):
        assert result[key] == trained.result[key], key
    assert result["attempts"] == 2
