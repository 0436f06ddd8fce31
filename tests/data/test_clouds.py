"""Azure's and Google's stores (emulators of them): shards are read, checkpoints and records kept, mistakes named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulators import Azurite, Emulator, FakeGcs
from launching import Cli, Saboteur

from orchestrator.cluster.claim import RecordTaken
from orchestrator.cluster.stored import StoredRecord
from orchestrator.data import transfer
from orchestrator.data.remote import Refused, open_at
from orchestrator.errors import DataError
from orchestrator.train.bucket import ABSENT, Bucket, Conflict

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", params=[Azurite, FakeGcs], ids=["az", "gs"])
def emulator(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shards: Path
) -> Iterator[Emulator]:
    """A server with the synthetic set below SCHEME://shards/set."""
    server = request.param(tmp_path_factory.mktemp("emulator"))
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        bucket = Bucket(f"{server.scheme}://shards/set")
        for path in sorted(path for path in shards.rglob("*") if path.is_file()):
            bucket.put_file(str(path.relative_to(shards)), path)
        bucket.close()
    yield server
    server.stop()


@pytest.fixture
def url(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address of the bucket, with the keys to it in the environment and a cache of this test's own."""
    for name, value in emulator.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return f"{emulator.scheme}://shards"


@pytest.fixture
def command(small: tuple[str, ...]) -> tuple[str, ...]:
    return ("train", *small, "model=timm", "model.name=saboteur", "recipe.ema_decay=0.9", "--json")


def test_training_from_the_store_ends_with_the_bits_of_local_shards(
    cli: Cli, url: str, command: tuple[str, ...], shards: Path
) -> None:
    local = cli.cold(*command)
    assert local.code == 0, local.err
    remote = cli.cold(*command, f"data.train={url}/set/train", f"data.val={url}/set/val", "runs_dir=remote")
    assert remote.code == 0, remote.err
    for key in ("state_sha256", "weights_sha256", "metrics", "data_digest", "step"):
        assert remote.json()[key] == local.json()[key], key
    cached = {path.stat().st_size for path in (cli.cwd / "cache" / "shards").glob("*.tar")}
    assert cached == {path.stat().st_size for path in shards.rglob("*.tar")}, "every shard came from the store"


@pytest.mark.parametrize("offset", [0, 1, 700, -1])
def test_reading_begins_at_the_byte_asked_for(url: str, shards: Path, offset: int) -> None:
    shard = min((shards / "train").glob("*.tar"))
    whole, place = shard.read_bytes(), f"{url}/set/train/{shard.name}"
    offset %= len(whole)
    reply = open_at(place, offset, None, 10)
    assert (reply.start, reply.total) == (offset, len(whole))
    assert whole[offset:].startswith(reply.read())
    again = open_at(place, 5, reply.version, 10)
    assert (again.start, again.version) == (5, reply.version)
    for one in (reply, again):
        one.close()
    with pytest.raises(Refused) as caught:
        open_at(place, 5, '"another"', 10)
    assert caught.value.status == 412


def test_a_bucket_a_name_or_keys_that_are_wrong_are_named_at_once_with_42(
    cli: Cli, url: str, emulator: Emulator, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = f"{emulator.scheme}://absent/set"
    refused = cli.cold(*command, f"data.train={missing}/train", f"data.val={missing}/val")
    assert refused.code == 42
    assert f"{missing}/train/shards.json: download failed" in refused.last_line()
    assert refused.last_line().endswith("check bucket and name, or `orchestrator shards index` over what is served now")
    with pytest.raises(DataError, match=r"/set/none: download failed .*check bucket and name"):
        transfer.read_all(f"{url}/set/none")
    mirrored = cli.cold(*command, f"checkpointing.mirror={emulator.scheme}://absent/runs")
    assert mirrored.code == 42
    assert emulator.missing in mirrored.last_line()
    for name, value in emulator.wrong_keys.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=rf"{emulator.refused}: .*check the credentials in the environment") as caught:
        transfer.read_all(f"{url}/set/train/shards.json")
    mirrored = cli.cold(*command, f"checkpointing.mirror={url}/runs")
    assert mirrored.code == 42
    assert emulator.refused in mirrored.last_line()
    assert "canary" not in str(caught.value) + mirrored.err


def test_keys_that_are_none_are_the_user_s_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "no base64!")
    with pytest.raises(DataError, match=r"Invalid Access Key.* Way out: check the address, and the keys"):
        transfer.read_all("az://container/x")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere.json")
    with pytest.raises(DataError, match=r"/nowhere.json: No such file.* Way out: check the address, and the keys"):
        transfer.read_all("gs://bucket/x")


def test_a_run_goes_on_from_the_checkpoints_in_the_store(
    cli: Cli, url: str, command: tuple[str, ...], saboteur: Saboteur
) -> None:
    whole = cli.cold(*command, "runs_dir=undisturbed")
    assert whole.code == 0, whole.err
    mirror = f"checkpointing.mirror={url}/runs"
    saboteur.arm("SIGTERM", 0, 4)
    assert cli.cold(*command, mirror, "runs_dir=one").code == 143
    resumed = cli.cold(*command, mirror, "runs_dir=two")
    assert resumed.code == 0, resumed.err
    assert "got step_00000004 from the mirror" in resumed.err
    assert resumed.json()["state_sha256"] == whole.json()["state_sha256"]
    bucket = Bucket(f"{url}/runs/{whole.json()['run_id']}/checkpoints")
    assert {name.partition("/")[0] for name in bucket.names()} == {
        "latest.json", "step_00000007.g0002", "step_00000014.g0002",
    }  # fmt: skip
    found = bucket.get("latest.json")
    assert found is not None
    assert json.loads(found[0])["folder"] == "step_00000014.g0002"
    bucket.close()


def test_of_two_writers_the_one_that_knows_the_version_wins(url: str, tmp_path: Path) -> None:
    bucket = Bucket(f"{url}/conditions")
    first = bucket.put("x", b"1", ABSENT)
    with pytest.raises(Conflict):
        bucket.put("x", b"2", ABSENT)
    second = bucket.put("x", b"3", first)
    with pytest.raises(Conflict):
        bucket.put("x", b"4", first)
    assert bucket.get("x") == (b"3", second)
    big = tmp_path / "big"
    big.write_bytes(bytes(range(256)) * 80_000)  # in more than one part
    bucket.put_file("folder/big", big)
    assert {key: size for key, (size, _) in bucket.entries().items()} == {"x": 1, "folder/big": 20_480_000}
    assert (bucket.folders(), list(bucket.entries("folder/"))) == (["folder"], ["folder/big"])
    assert bucket.get_file("folder/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big.read_bytes()
    assert not bucket.get_file("none", tmp_path / "none")
    bucket.remove("x")
    bucket.remove("x")
    assert bucket.get("x") is None
    bucket.close()


def test_the_record_of_a_run_has_one_writer_there_too(url: str, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    old, new, waiting = (StoredRecord(f"{url}/kept/run", tmp_path / name) for name in "abc")
    old.claim()
    old.begin(1, range(1))
    (tmp_path / "a" / "result.json").write_text('{"state": "running"}')
    assert old.flush(30) is None
    new.claim()
    assert (tmp_path / "b" / "result.json").read_text() == '{"state": "running"}'
    assert [path.name for path in (tmp_path / "b" / "logs").iterdir()] == ["attempt_1"]
    (tmp_path / "a" / "result.json").write_text('{"state": "old"}')
    with pytest.raises(RecordTaken):
        old.flush(30)
    new.begin(2, range(1))
    (tmp_path / "b" / "result.json").write_text('{"state": "done"}')
    assert new.flush(30) is None
    assert waiting.is_finished()
    for record in (old, new, waiting):
        record.close()
