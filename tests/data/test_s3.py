"""A real S3 server (SeaweedFS): right bytes through its death, and each mistake by its name."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_index import make_set

from orchestrator import secrets
from orchestrator.data import objects, transfer
from orchestrator.data.index import Shard, ShardIndex, load_index
from orchestrator.data.objects import shorten, status_of
from orchestrator.data.reader import ShardReader
from orchestrator.data.remote import Refused, Reply, open_at
from orchestrator.data.store import Counts, ShardStore
from orchestrator.errors import DataError, TransientError
from orchestrator.train.bucket import Bucket

weed = shutil.which("weed", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(weed is None, reason="no SeaweedFS (`weed`) in this environment")

KEY, SECRET, BUCKET = "test-key", "test-secret", "shards"
IMAGE = 8_000_000


def free_ports(count: int) -> list[int]:
    """Ports P whose P + 10,000 is free too: SeaweedFS speaks gRPC there."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 10_000))
            except (OSError, OverflowError):
                continue
            if port not in ports:
                ports.append(port)
    return ports


class Server:
    """SeaweedFS with S3 at `url`; its content survives a stop."""

    def __init__(self, folder: Path, host: str = "127.0.0.1"):
        """`host`: an address of this machine."""
        self.folder, self.host = folder, host
        self.s3, self.master, self.volume, self.filer = free_ports(4)
        self.url = f"http://{host}:{self.s3}"
        identity = {"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir()

    def start(self) -> None:
        assert weed
        places = [f"-ip={self.host}", f"-ip.bind={self.host}", f"-dir={self.folder / 'data'}"]
        ports = [f"-master.port={self.master}", f"-volume.port={self.volume}", f"-filer.port={self.filer}"]
        s3 = [
            "-s3",
            f"-s3.port={self.s3}",
            f"-s3.config={self.folder / 's3.json'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        command = [
            weed,
            f"-logdir={self.folder}",
            "server",
            *places,
            *ports,
            *s3,
            "-master.volumeSizeLimitMB=64",
            "-master.electionTimeout=1s",
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(20)


UPLOAD = """
import sys
sys.path[:0] = [sys.argv[1]]
from test_s3 import upload
upload(*sys.argv[2:])
"""


def upload(url: str, folder: str, filer: str) -> None:
    """Put a folder into the bucket, as soon as the server takes it; runs beside: obstore's threads forbid a fork."""
    import requests
    from obstore.store import S3Store

    deadline = time.monotonic() + 60
    while True:
        try:
            requests.post(f"{filer}/buckets/{BUCKET}/", timeout=5).raise_for_status()
            options: Any = {"allow_http": True}
            store = S3Store(BUCKET, endpoint=url, access_key_id=KEY, secret_access_key=SECRET, client_options=options)
            for path in sorted(Path(folder).iterdir()):
                store.put(f"sets/a/{path.name}", path.read_bytes())
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def content(i: int) -> bytes:
    return np.random.default_rng(i).integers(0, 256, IMAGE, np.uint8).tobytes()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two shards of 16 MB below s3://shards/sets/a."""
    folder = tmp_path_factory.mktemp("s3")
    shards = [[(f"{i}{j}.{k}", b"1" if k == "cls" else content(2 * i + j)) for j in (0, 1) for k in ("cls", "jpg")]
              for i in range(2)]  # fmt: skip
    make_set(folder / "set", shards)
    (folder / "weed").mkdir()
    server = Server(folder / "weed")
    server.start()
    try:
        filer = f"http://127.0.0.1:{server.filer}"
        arguments = [str(Path(__file__).parent), server.url, str(folder / "set"), filer]
        subprocess.run([sys.executable, "-c", UPLOAD, *arguments], check=True, timeout=90)
        yield server
    finally:
        server.stop()


@pytest.fixture
def index(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardIndex:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return load_index(f"s3://{BUCKET}/sets/a")


def test_a_set_in_a_bucket_is_read_in_full(index: ShardIndex) -> None:
    assert index.shards[0].location == f"s3://{BUCKET}/sets/a/x-000.tar"
    reader = ShardReader(index)
    assert [reader.read(i).image for i in range(4)] == [content(i) for i in range(4)]
    assert reader.take_counts() == Counts(2, sum(shard.filesize for shard in index.shards), 0)
    reader.close()


def read_or_die(index: ShardIndex, id: int) -> None:
    assert ShardReader(index).read(id).image == content(id)


def test_forked_loader_processes_read_objects_too(index: ShardIndex) -> None:
    """obstore's own threads would hang there: the index was read by this process, their parent."""
    processes = [multiprocessing.get_context("fork").Process(target=read_or_die, args=(index, i)) for i in (0, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize("offset", [0, 1, 1_000_000, 15_999_999])
def test_reading_begins_at_the_byte_asked_for(index: ShardIndex, server: Server, offset: int) -> None:
    whole = (server.folder.parent / "set" / "x-001.tar").read_bytes()
    reply = open_at(index.shards[1].location, offset, None, 10)
    assert (reply.start, reply.total) == (offset, len(whole))
    assert whole[offset:].startswith(reply.read())
    again = open_at(index.shards[1].location, 5, reply.version, 10)
    assert again.version == reply.version
    for one in (reply, again):
        one.close()
    with pytest.raises(Refused) as caught:
        open_at(index.shards[1].location, 5, '"another"', 10)
    assert caught.value.status == 412


@pytest.mark.parametrize(
    ("secret", "place", "text"),
    [
        ("canary", f"s3://{BUCKET}/sets/a", "SignatureDoesNotMatch: .*check the credentials in the environment"),
        (SECRET, "s3://absent/sets/a", "NoSuchBucket: .*check bucket and name"),
        (SECRET, f"s3://{BUCKET}/sets/b", "NoSuchKey: .*check bucket and name"),
    ],
)
def test_mistakes_are_named_at_once_and_without_the_secret(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch, secret: str, place: str, text: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"{place}/shards.json: download failed \({text}") as caught:
        load_index(place)
    assert time.monotonic() - began < 10
    assert "canary" not in str(caught.value)
    assert index.shards


def test_keys_in_a_file_count_before_those_of_the_environment_for_reading_and_for_writing(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-in-the-environment")
    file = tmp_path / "keys"
    file.write_text(f"AWS_ACCESS_KEY_ID={KEY}\nAWS_SECRET_ACCESS_KEY={SECRET}\n")
    file.chmod(0o600)
    monkeypatch.setattr(secrets, "_FOR_STORES", [str(file)])
    assert load_index(f"s3://{BUCKET}/sets/a").digest == index.digest
    bucket = Bucket(f"s3://{BUCKET}/kept")
    bucket.put("x", b"content")
    assert (bucket.get("x") or ("",))[0] == b"content"
    bucket.close()


def test_a_shard_that_is_missing_in_the_bucket_is_named(index: ShardIndex) -> None:
    gone = replace(index.shards[0], location=f"s3://{BUCKET}/sets/a/x-009.tar", sha256="9" * 64)
    with pytest.raises(DataError, match=r"s3://shards/sets/a/x-009.tar: download failed \(NoSuchKey"):
        ShardStore().path(gone)


@pytest.mark.slow
def test_a_download_survives_the_servers_death_and_goes_on_where_it_broke(
    index: ShardIndex, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, opened, killed = index.shards[0], [], threading.Event()

    class Killing(Reply):
        def read(self) -> bytes:
            chunk = super().read()
            if not killed.is_set():
                server.stop()  # what is in flight still comes
                assert server.process.returncode == -signal.SIGKILL
                killed.set()
            return chunk

    def opening(url: str, offset: int, version: str | None, stall_s: float) -> Reply:
        opened.append(offset)
        reply = open_at(url, offset, version, stall_s)
        return Killing(reply.body, reply.start, reply.total, reply.version)

    monkeypatch.setattr(transfer, "open_at", opening)
    monkeypatch.setattr(transfer, "LONGEST_PAUSE_S", 1.0)
    monkeypatch.setattr(transfer, "TRIES", 40)
    restart = threading.Thread(target=lambda: (killed.wait(60), time.sleep(1), server.start()))
    restart.start()
    store = ShardStore()
    path = store.path(shard)
    restart.join()
    assert killed.is_set()
    assert path.read_bytes() == (server.folder.parent / "set" / "x-000.tar").read_bytes()
    counts = store.take_counts()
    assert counts.retries >= 1
    assert counts.bytes == shard.filesize  # none came twice
    assert 0 < opened[1] < shard.filesize


def test_a_server_that_stays_away_is_named(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(transfer, "PAUSE_S", 0.01)
    with pytest.raises(TransientError, match=r"s3://shards/x.tar: download failed after 6 tries .*0 of 5 bytes"):
        ShardStore().path(Shard(f"s3://{BUCKET}/x.tar", 1, 5, "1" * 64))


@pytest.mark.parametrize("url", ["az://container/x.tar"])
def test_a_store_without_its_settings_says_so(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match=r"download failed .*Account must be specified"):
        transfer.read_all(url)


def test_a_silent_reading_process_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setattr(objects, "CONNECT_S", 0.3)
        with pytest.raises(Refused, match=r"no answer within 0.5 s"):
            open_at(f"s3://{BUCKET}/x.tar", 0, None, 0.2)
    assert children() == set()


def children() -> set[str]:
    """Reading processes of this one."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    found = {child for task in tasks for child in task.read_text().split()}
    return {child for child in found if "objects.py" in Path(f"/proc/{child}/cmdline").read_text(errors="replace")}


@pytest.mark.parametrize(
    ("kind", "text", "status"),
    [
        ("NotFoundError", "any", 404),
        ("GenericError", "Server returned non-2xx status code: 503 Slow Down: <?xml", 503),
        ("GenericError", "HTTP error: error sending request", None),
        ("Unusable", "Account must be specified", 400),
    ],
)
def test_statuses_are_read_from_what_obstore_says(kind: str, text: str, status: int | None) -> None:
    assert status_of(kind, text) == status


def test_a_report_is_shortened_to_what_a_person_needs() -> None:
    assert shorten("x <Error><Code>NoSuchKey</Code>\n<Message>gone</Message></Error> y") == "NoSuchKey: gone"
    assert shorten("Generic S3 error: refused\n\nDebug source: Http { .. }") == "Generic S3 error: refused"
    assert shorten("<Code>NotThere</Code><Message>gone RequestId:1 Time:2</Message>") == "NotThere: gone"
    assert shorten("GET http://169.254.169.254/token?a in 1ms - refused") == (
        "no keys are given, and this machine has no identity of its own there (refused)"
    )
