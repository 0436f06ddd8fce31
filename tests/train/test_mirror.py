"""The mirror of checkpoints in a store: whole or absent there too, through the store's death, for one writer."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from launching import Cli, Saboteur, wait_for
from test_checkpoint import make_state

from orchestrator.compose import compose
from orchestrator.config import CheckpointingConfig
from orchestrator.errors import TransientError
from orchestrator.train import mirror as mirrors
from orchestrator.train.bucket import ABSENT, Bucket, Conflict
from orchestrator.train.checkpoint import open_checkpoint
from orchestrator.train.fence import Fence
from orchestrator.train.mirror import StoreMirror, TakenOver
from orchestrator.train.retention import prune
from orchestrator.train.writing import write_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "data"))
from test_s3 import KEY, SECRET, Server, weed

needs_weed = pytest.mark.skipif(weed is None, reason="no SeaweedFS (`weed`) in this environment")
pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("weed"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def store(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address of a fresh folder in a bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    url = f"s3://runs/{tmp_path.name}"
    wait_for(lambda: answers(server), "the store's bucket", 60)
    return url


def answers(server: Server) -> bool:
    bucket = Bucket("s3://runs/probe")
    try:
        requests.post(f"http://127.0.0.1:{server.filer}/buckets/runs/", timeout=5)  # the first time makes it
        bucket.put("x", b"1")
    except OSError:
        return False
    finally:
        bucket.close()
    return True


@pytest.fixture
def settings() -> CheckpointingConfig:
    return replace(compose([]).config.checkpointing, keep_last=2, keep_best=1, mirror="s3://runs")


class Machine:
    """A place where a run is trained."""

    def __init__(self, root: Path, url: str, settings: CheckpointingConfig, attempt: int = 1):
        self.root, self.settings = root, settings
        self.fence = Fence(root, attempt)
        self.mirror = StoreMirror(url, settings, self.fence)

    def save(self, step: int, acc1: float = 0.5) -> Path:
        metrics = {"val/acc1": {"hits": 1, "count": 2, "value": acc1}}
        manifest = {"step": step, "metrics": metrics, "world_size": 1}
        folder = write_checkpoint(self.fence, make_state(step + 3), [b"random states"], manifest)
        self.mirror.offer()
        prune(self.fence, self.settings, self.mirror.held)
        return folder

    def steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step_")) for path in self.root.glob("step_*"))

    def close(self) -> None:
        self.mirror.close()
        self.fence.release()


def folders(url: str) -> list[str]:
    bucket = Bucket(url)
    try:
        return sorted({name.split("/")[0] for name in bucket.names() if "/" in name})
    finally:
        bucket.close()


@pytest.fixture(params=["file", pytest.param("s3", marks=needs_weed)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/store" if request.param == "file" else request.getfixturevalue("store")


def test_what_stays_here_is_there_too_and_another_machine_begins_with_the_newest(
    tmp_path: Path, url: str, settings: CheckpointingConfig
) -> None:
    one = Machine(tmp_path / "one", url, settings)
    one.mirror.bring(-1)
    for step, acc1 in enumerate((0.1, 0.9, 0.2, 0.3, 0.4), start=1):
        one.save(step, acc1)
        one.mirror.finish(60)
        assert folders(url) == [f"step_{step:08d}.g0001" for step in one.steps()]
    assert one.steps() == [2, 4, 5]
    one.close()
    two = Machine(tmp_path / "two", url, settings)
    two.mirror.bring(-1)
    assert two.steps() == [5]
    names = [path.name for path in (one.root / "step_00000005").iterdir()]
    assert all(
        (two.root / "step_00000005" / name).read_bytes() == (one.root / "step_00000005" / name).read_bytes()
        for name in names
    )
    two.close()
    three = Machine(one.root, url, settings, attempt=2)
    three.mirror.bring(5)  # nothing newer is there
    assert three.steps() == [2, 4, 5]
    three.close()


def test_a_damaged_one_in_the_store_is_named_and_passed_over_and_half_of_one_is_removed(
    tmp_path: Path, settings: CheckpointingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    url, place = f"file://{tmp_path}/store", tmp_path / "store"
    one = Machine(tmp_path / "one", url, settings)
    one.mirror.bring(-1)
    for step in (1, 2, 3):
        one.save(step)
        one.mirror.finish(60)
    one.close()
    damaged = bytearray((place / "step_00000003.g0001" / "optimizer.pt").read_bytes())
    damaged[-100] ^= 1
    (place / "step_00000003.g0001" / "optimizer.pt").write_bytes(damaged)
    shutil.copytree(place / "step_00000003.g0001", place / "step_00000004.g0001")
    (place / "step_00000004.g0001" / "manifest.json").unlink()
    two = Machine(tmp_path / "two", url, settings)
    with caplog.at_level(logging.WARNING):
        two.mirror.bring(-1)
    two.close()
    assert two.steps() == [2]
    assert "step_00000003.g0001" in caplog.text
    assert "optimizer.pt was damaged" in caplog.text
    assert "step_00000004.g0001" not in folders(url)
    assert list(two.root.glob(".attempt*")) == []


@needs_weed
def test_an_older_writer_that_is_still_alive_changes_nothing_and_ends(
    tmp_path: Path, store: str, settings: CheckpointingConfig
) -> None:
    old = Machine(tmp_path / "old", store, settings)
    old.mirror.bring(-1)
    old.save(1)
    old.mirror.finish(60)
    new = Machine(tmp_path / "new", store, settings)
    new.mirror.bring(-1)
    new.save(2)
    new.mirror.finish(60)
    old.save(3)
    with pytest.raises(TakenOver, match="so this attempt ends"):
        old.mirror.finish(60)
    bucket = Bucket(store)
    found = bucket.get("latest.json")
    assert found is not None
    pointer = json.loads(found[0])
    assert (pointer["step"], pointer["generation"], pointer["folder"]) == (2, 2, "step_00000002.g0002")
    bucket.close()
    new.save(4)
    new.mirror.finish(60)
    for machine in (old, new):
        machine.close()


@needs_weed
def test_an_older_writer_that_is_overtaken_amid_an_upload_leaves_no_checkpoint_without_files(
    tmp_path: Path, store: str, settings: CheckpointingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (Machine(tmp_path / name, store, settings) for name in ("old", "new"))
    put = Bucket.put_file

    def put_and_be_overtaken(bucket: Bucket, key: str, path: Path) -> None:
        put(bucket, key, path)
        if key == "step_00000001.g0001/model.safetensors":
            new.mirror.bring(-1)  # which removes it, as half of a checkpoint

    old.mirror.bring(-1)
    monkeypatch.setattr(Bucket, "put_file", put_and_be_overtaken)
    old.save(1)
    with pytest.raises(TakenOver):
        old.mirror.finish(60)
    bucket = Bucket(store)
    assert not [name for name in bucket.names() if name.endswith("manifest.json")]
    bucket.close()
    for machine in (old, new):
        machine.close()


@needs_weed
def test_saves_go_on_while_the_store_is_dead_and_arrive_when_it_lives_again(
    tmp_path: Path, store: str, settings: CheckpointingConfig, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(tmp_path / "one", store, settings)
    machine.mirror.bring(-1)
    machine.save(1)
    machine.mirror.finish(60)
    server.stop()
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        machine.save(2)
        machine.save(3)
        with pytest.raises(TransientError, match="the last checkpoint is on this machine only") as caught:
            machine.mirror.finish(1)
    assert caught.value.exit_code == 75
    assert time.monotonic() - began < 10
    assert machine.steps() == [1, 2, 3] or machine.steps() == [2, 3]
    assert caplog.text.count("training goes on and the mirror is tried again") == 1
    threading.Timer(0.5, server.start).start()
    machine.mirror.finish(90)
    assert folders(store)[-2:] == ["step_00000002.g0001", "step_00000003.g0001"]
    open_checkpoint(machine.root / "step_00000003")
    machine.close()


def test_a_store_that_does_not_answer_at_the_start_stops_only_a_run_that_has_nothing_here(
    tmp_path: Path, settings: CheckpointingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(mirrors, "START_TRIES", 1)
    machine = Machine(tmp_path / "one", "s3://runs/a", settings)
    with pytest.raises(TransientError, match="the same command goes on once the store answers"):
        machine.mirror.bring(-1)
    machine.mirror.bring(7)
    assert "goes on without its mirror" in caplog.text
    machine.close()


@needs_weed
def test_a_conditional_put_is_refused_where_the_object_changed(store: str) -> None:
    bucket = Bucket(store)
    first = bucket.put("x", b"1", ABSENT)
    with pytest.raises(Conflict):
        bucket.put("x", b"2", ABSENT)
    second = bucket.put("x", b"3", first)
    with pytest.raises(Conflict):
        bucket.put("x", b"4", first)
    assert bucket.get("x") == (b"3", second)
    assert bucket.get("y") is None
    bucket.close()


def test_a_run_goes_on_where_another_machine_left_off(cli: Cli, small: tuple[str, ...], saboteur: Saboteur) -> None:
    command = ("train", *small, "model=timm", "model.name=saboteur", "recipe.ema_decay=0.9", "--json")
    mirrored = f"checkpointing.mirror=file://{cli.cwd}/store"
    whole = cli(*command, "runs_dir=undisturbed")
    assert whole.code == 0, whole.err
    saboteur.arm("SIGTERM", 0, 4)
    assert cli(*command, mirrored, "runs_dir=one").code == 143
    resumed = cli(*command, mirrored, "runs_dir=two")
    assert resumed.code == 0, resumed.err
    assert "got step_00000004 from the mirror" in resumed.err
    assert "resuming at step 4 of 14" in resumed.err
    assert resumed.json()["state_sha256"] == whole.json()["state_sha256"]
    run_id = whole.json()["run_id"]
    assert folders(f"file://{cli.cwd}/store/{run_id}/checkpoints") == ["step_00000007.g0002", "step_00000014.g0002"]
