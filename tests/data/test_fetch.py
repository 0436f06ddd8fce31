"""Shards from far: complete after whatever the line and the server do, or an error with a name; one cache per node."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Fault, Served, serving
from test_index import make_set

from orchestrator.data import reader as reading
from orchestrator.data import transfer
from orchestrator.data.cache import GIB, Cache
from orchestrator.data.damage import DamagedShard
from orchestrator.data.fetch import local_path
from orchestrator.data.index import Shard, load_index
from orchestrator.data.reader import ShardReader
from orchestrator.data.remote import beside, open_at
from orchestrator.data.store import Counts, ShardStore
from orchestrator.data.transfer import read_all
from orchestrator.data.web import retry_after
from orchestrator.errors import ConfigError, DataError, NodeError, OrchestratorError, TransientError
from orchestrator.redact import redact

IMAGE = 400_000
FORK = multiprocessing.get_context("fork")


def content(i: int) -> bytes:
    return np.random.default_rng(i).integers(0, 256, IMAGE, np.uint8).tobytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "PAUSE_S", 0.01)
    monkeypatch.setattr(transfer, "STALL_S", 0.5)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def set_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of about 800 kB."""
    folder = tmp_path_factory.mktemp("far") / "set"
    shards = [[(f"{i}{j}.{k}", b"1" if k == "cls" else content(2 * i + j)) for j in (0, 1) for k in ("cls", "jpg")]
              for i in range(5)]  # fmt: skip
    return make_set(folder, shards)


@pytest.fixture
def far(set_folder: Path, cache: Path) -> Iterator[Served]:
    with serving(set_folder) as served:
        yield served


def first(far: Served) -> Shard:
    return load_index(far.url).shards[0]


def near(shard: Shard, far: Served) -> bytes:
    return (far.folder / shard.location.rsplit("/", 1)[1]).read_bytes()


RECOVERING = {
    "cut": [Fault(cut_at=300_000)],
    "cut thrice": [Fault(cut_at=300_000), Fault(cut_at=0), Fault(cut_at=100)],
    "silence in the middle": [Fault(cut_at=300_000, stall_s=2)],
    "silence before the first byte": [Fault(cut_at=0, stall_s=2)],
    "503": [Fault(status=503)] * 3,
    "429": [Fault(status=429)] * 3,
    "500 after a cut": [Fault(cut_at=300_000), Fault(status=500)],
    "a bit flipped on the way": [Fault(flip_at=12_345)],
    "a length too great": [Fault(length_off=1000)],
    "a length too small": [Fault(length_off=-1000)],
    "no length, cut": [Fault(cut_at=300_000, no_length=True)],
    "ranges ignored after a cut": [Fault(cut_at=300_000), Fault(ignore_range=True)],
    "other content when it goes on": [Fault(content=b"x" * 500_000, cut_at=300_000), Fault()],
    "other content, ranges without a version": [
        Fault(content=b"x" * 900_000, cut_at=300_000, version="", length_off=-80_640), Fault(version=""),
    ],
    "a weak version": [Fault(cut_at=300_000, version='W/"1"'), Fault(version='W/"1"')],
}  # fmt: skip


@pytest.mark.parametrize("faults", RECOVERING.values(), ids=RECOVERING.keys())
def test_a_shard_is_complete_after_a_fault_that_passes(far: Served, faults: list[Fault]) -> None:
    shard = first(far)
    far.faults[:] = faults
    store = ShardStore()
    assert store.path(shard).read_bytes() == near(shard, far)
    assert not far.faults
    counts = store.take_counts()
    assert counts.shards == 1
    assert counts.retries >= 1
    store.close()


def test_a_broken_download_goes_on_at_the_byte_where_it_broke(far: Served) -> None:
    shard = first(far)
    far.faults[:] = [Fault(cut_at=300_000), Fault(cut_at=200_000)]
    store = ShardStore()
    store.path(shard)
    assert far.ranges() == [None, "bytes=300000-", "bytes=500000-"]
    assert store.take_counts() == Counts(1, shard.filesize, 2)


LASTING = {
    "absent": (Fault(status=404), DataError, "404 Not Found.*check bucket and name"),
    "forbidden": (Fault(status=403), DataError, "403 Forbidden.*check the credentials"),
    "always busy": (Fault(status=503), TransientError, "after 6 tries .503 Service Unavailable; status 503., 0 of "),
    "never a byte": (Fault(cut_at=0), TransientError, "after 6 tries .*onnection broken.*, 0 of 808,960 bytes"),
    "ever silent": (Fault(cut_at=5, stall_s=9), TransientError, "after 6 tries .*imed? ?out.*, 0 of|bytes had come"),
    "a bit flipped": (Fault(flip_at=12_345), DamagedShard, "damaged: bytes changed, member 00.jpg, offset 1,536"),
    "other content": (Fault(content=b"x"), DamagedShard, "cut short in a header .1 bytes, the index says"),
    "longer": (Fault(content=bytes(2_000_000)), DataError, "2,000,000 bytes came, the index says"),
    "a lying length": (Fault(length_off=7), DataError, "bytes came, the index says"),
}


@pytest.mark.parametrize(("fault", "error", "text"), LASTING.values(), ids=LASTING.keys())
def test_a_fault_that_stays_is_named_in_time_and_leaves_nothing(
    far: Served, cache: Path, fault: Fault, error: type[OrchestratorError], text: str
) -> None:
    shard = first(far)
    far.always = fault
    began = time.monotonic()
    with pytest.raises(error, match=text) as caught:
        local_path(shard)
    assert time.monotonic() - began < 15  # 6 tries of 0.5 s of silence and pauses below 1 s
    assert str(caught.value).count(shard.location) == 1
    assert "Way out: " in str(caught.value)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_server_that_is_not_there_is_named(cache: Path) -> None:
    with pytest.raises(TransientError, match=r"http://127.0.0.1:1/x.tar: download failed after 6 tries .*efused"):
        local_path(Shard("http://127.0.0.1:1/x.tar", 1, 5, "1" * 64))


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(far: Served, status: int) -> None:
    shard = first(far)
    far.faults[:] = [Fault(status=status, retry_after="1")]
    local_path(shard)
    asked = [at for at, (path, _) in zip(far.times, far.requests, strict=True) if path.endswith(".tar")]
    assert 1 <= asked[1] - asked[0] < 3


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("7", 7, 7), ("0", 0, 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0), ("Fri, 01 Jan 2100 00:00:00 GMT", 1e6, 1e10)],
)
def test_retry_after_is_seconds_or_a_date(value: str, low: float, high: float) -> None:
    seconds = retry_after(value)
    assert seconds is not None
    assert low <= seconds <= high
    assert retry_after("soon") is retry_after(None) is None


def test_pauses_differ_between_readers_and_grow() -> None:
    pauses: list[float] = []

    class Clock:
        def wait(self, seconds: float) -> None:
            pauses.append(seconds)

        def is_set(self) -> bool:
            return False

    for fruitless in range(1, 8):
        one: Any = transfer.Transfer("http://x", BytesIO(), 5, Clock())  # pyright: ignore[reportArgumentType]
        for _ in range(20):
            one._pause(OSError(), fruitless)
    rounds = [pauses[20 * i : 20 * i + 20] for i in range(7)]
    assert all(len(set(round)) == 20 and max(round) <= 60 for round in rounds)
    assert all(max(a) < 3.1 * min(b) for a, b in itertools.pairwise(rounds))
    assert min(rounds[5]) > max(rounds[1])


SECRETS = ["http://user:canary@h/x.tar", "s3://h/x.tar?X-Amz-Signature=canary", "x http://a:canary@h/y?t=canary' z"]


@pytest.mark.parametrize("text", SECRETS)
def test_credentials_leave_no_trace_in_a_text(text: str) -> None:
    assert "canary" not in redact(text)
    assert "h/" in redact(text)


@pytest.mark.parametrize("fault", [f for f, *_ in LASTING.values()], ids=LASTING.keys())
def test_no_error_shows_the_credentials_of_its_address(far: Served, fault: Fault) -> None:
    shard = first(far)
    shard = replace(shard, location=shard.location.replace("//", "//user:canary@") + "?token=canary")
    far.always = fault
    with pytest.raises(OrchestratorError) as caught:
        local_path(shard)
    assert "canary" not in str(caught.value)
    assert "canary" not in repr(caught.value.__cause__)


@pytest.mark.parametrize("base", ["http://h/a/shards.json", "s3://h/a/shards.json", "gs://h/a/shards.json"])
def test_shards_lie_beside_their_index(base: str) -> None:
    assert beside(base, "x.tar") == base.replace("shards.json", "x.tar")


def test_an_opener_of_the_users_is_taken_and_those_that_run_commands_are_not(
    set_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from webdataset.gopen import gopen_schemes

    def mine(url: str, mode: str = "rb", bufsize: int = 8192) -> Any:
        return open(set_folder / url.rsplit("/", 1)[1], mode)

    monkeypatch.setitem(gopen_schemes, "mine", mine)
    index = load_index("mine://here/")
    assert local_path(index.shards[1]).read_bytes() == (set_folder / "x-001.tar").read_bytes()
    for scheme in ("ais", "hf", "sftp", "nonsense"):
        with pytest.raises(DataError, match=f"{scheme}: is not read.*webdataset.gopen_schemes"):
            read_all(f"{scheme}://host/x.tar")


def test_commands_run_only_where_the_environment_allows_them(
    set_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = load_index(str(set_folder)).shards[0]
    piped = replace(shard, location=f"pipe:cat {shard.location}")
    with pytest.raises(DataError, match=r"pipe: is not read.*ORCHESTRATOR_ALLOW_PIPE=1"):
        local_path(piped)
    monkeypatch.setenv("ORCHESTRATOR_ALLOW_PIPE", "1")
    assert local_path(piped).read_bytes() == Path(shard.location).read_bytes()


def test_equal_names_in_two_sets_are_two_files_and_equal_shards_are_one(
    tmp_path: Path, cache: Path, set_folder: Path
) -> None:
    make_set(tmp_path / "both" / "a", [[("k.cls", b"1"), ("k.jpg", b"A")]])
    make_set(tmp_path / "both" / "b", [[("k.cls", b"1"), ("k.jpg", b"B")]])
    make_set(tmp_path / "both" / "c", [[("k.cls", b"1"), ("k.jpg", b"B")]])
    with serving(tmp_path / "both") as served:
        paths = [local_path(load_index(f"{served.url}/{name}").shards[0]) for name in "abc"]
        for name, path in zip("abc", paths, strict=True):
            assert path.read_bytes() == (tmp_path / "both" / name / "x-000.tar").read_bytes()
        assert paths[0] != paths[1] == paths[2]
        assert len(served.ranges()) == 2


def in_processes(count: int, work: Callable[[], object]) -> list[int | None]:
    def run() -> None:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)

    processes = [FORK.Process(target=run) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_processes_that_want_the_same_shard_make_one_download(far: Served, cache: Path) -> None:
    shard = first(far)
    whole, far.pace_s = near(shard, far), 0.02

    def work() -> None:
        store = ShardStore()
        assert store.path(shard).read_bytes() == whole

    assert in_processes(3, work) == [0, 0, 0]
    assert far.ranges() == [None]
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [f"{shard.sha256}.tar"]


@pytest.mark.slow
def test_nobody_waits_for_the_reader_of_a_shard_that_has_become_whole(far: Served, cache: Path) -> None:
    """The file that was filled and the shard that is read are one inode, and readers hold theirs for hours."""
    shard, hold_s = first(far), 3.0
    far.pace_s = 0.02

    def work() -> None:
        store, began = ShardStore(), time.monotonic()
        _, descriptor = store.open(shard)
        assert time.monotonic() - began < hold_s
        if store.counts.shards:  # who fetched it reads it for a while
            time.sleep(2 * hold_s)
        os.close(descriptor)

    assert in_processes(4, work) == [0, 0, 0, 0]
    assert far.ranges() == [None]


def test_what_is_fetched_ahead_is_there_when_it_is_needed(far: Served) -> None:
    shards = load_index(far.url).shards
    store = ShardStore()
    store.ahead(shards)
    store.ahead(shards)
    deadline = time.monotonic() + 20
    while store.counts.shards < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(far.ranges()) == 4  # bounded
    assert [store.path(shard).read_bytes() for shard in shards] == [near(shard, far) for shard in shards]
    assert len(far.ranges()) == 5
    store.close()


def test_the_shards_of_one_batch_come_side_by_side(far: Served) -> None:
    """Were each fetched when it is opened, their seconds would add up."""
    index, far.pace_s = load_index(far.url), 0.05
    reader = ShardReader(index)
    found = reader.locate(np.arange(10))
    assert [os.pread(int(d), int(n), int(o)) for d, o, n in zip(*found[:3], strict=True)] == list(
        map(content, range(10))
    )
    asked = [at for at, (path, _) in zip(far.times, far.requests, strict=True) if path.endswith(".tar")]
    alone_s = index.shards[0].filesize / (64 << 10) * far.pace_s
    assert len(asked) == 5
    assert asked[1] - asked[0] < alone_s / 2
    reader.close()


def test_processes_that_need_the_same_shards_begin_at_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, process in itertools.product((2, 5, 16, 64), (7, 100, 54_321)):
        begun = []
        for number in range(process, process + min(count, 8) // 2 * 2):
            monkeypatch.setattr(os, "getpid", lambda number=number: number)
            order = reading.from_a_place_of_its_own(list(range(count)))
            assert sorted(order) == list(range(count))
            begun.append(order[0])
        assert len(set(begun[:2])) == 2
        assert len(set(begun)) >= len(begun) - 2


def test_an_error_ahead_surfaces_where_the_shard_is_needed(far: Served) -> None:
    (bad, good, *_) = load_index(far.url).shards
    far.faults[:] = [Fault(status=404)]
    store = ShardStore()
    store.ahead([bad])
    while far.faults:
        time.sleep(0.01)
    assert store.path(good).read_bytes() == near(good, far)
    with pytest.raises(DataError, match=r"x-000.tar: download failed .404"):
        store.path(bad)
    assert store.path(bad).read_bytes() == near(bad, far)
    store.close()


def test_closing_ends_what_is_under_way(far: Served) -> None:
    shards = load_index(far.url).shards
    far.pace_s = 1
    store = ShardStore()
    store.ahead(shards)
    while not far.ranges():
        time.sleep(0.01)
    began = time.monotonic()
    store.close()
    assert time.monotonic() - began < 5


def test_a_store_travels_to_other_processes_and_starts_anew_there(far: Served) -> None:
    shards = load_index(far.url).shards
    store = ShardStore()
    store.ahead(shards[:1])
    store.path(shards[0])
    import pickle

    copy = pickle.loads(pickle.dumps(store))
    assert copy.counts == Counts()
    assert copy.path(shards[1]).read_bytes() == near(shards[1], far)
    store.close()


def gib(*shards: Shard) -> float:
    return sum(shard.filesize for shard in shards) / GIB


def cached(cache: Path) -> int:
    nbytes = 0
    for path in cache.rglob("*"):
        with suppress(FileNotFoundError):  # evicted meanwhile, as it may be
            nbytes += path.stat().st_size if path.is_file() else 0
    return nbytes


def test_the_longest_unused_shards_go_first_and_the_cap_holds(far: Served, cache: Path) -> None:
    shards = load_index(far.url).shards
    store = ShardStore(gib(*shards[:3]))
    for i in (0, 1, 2, 0, 3):
        store.path(shards[i])
        assert cached(cache) <= sum(shard.filesize for shard in shards[:3])
    assert {path.stem for path in (cache / "shards").iterdir()} == {shards[i].sha256 for i in (0, 2, 3)}
    assert len(far.ranges()) == 4


def test_a_shard_in_use_goes_last_and_stays_readable_when_it_goes(far: Served, cache: Path) -> None:
    shards = load_index(far.url).shards
    store = ShardStore(gib(*shards[:2]))
    path, descriptor = store.open(shards[0])
    store.path(shards[1])
    store.path(shards[2])
    assert path.exists()  # the idle one went, though it was used later
    _, second = store.open(shards[2])
    store.path(shards[3])
    assert not path.exists()
    assert os.pread(descriptor, shards[0].filesize, 0) == near(shards[0], far)
    os.close(descriptor)
    os.close(second)


def test_a_reader_under_a_cap_reads_everything_all_the_same(far: Served, cache: Path) -> None:
    index = load_index(far.url)
    reader = ShardReader(index, cache_gib=gib(*index.shards[:2]))
    order = [*range(10), *range(9, -1, -1), *random.Random(1).sample(range(10), 10)]
    for id in order:
        reader.ahead(np.arange(10))
        assert reader.read(id).image == content(id)
        assert cached(cache) <= sum(shard.filesize for shard in index.shards[:2])
    reader.close()


def test_two_processes_under_one_cap_read_right_bytes_and_keep_it(far: Served, cache: Path) -> None:
    shards = load_index(far.url).shards
    cap = sum(shard.filesize for shard in shards[:2])

    def work() -> None:
        store, order = ShardStore(cap / GIB), random.Random(os.getpid())
        for _ in range(25):
            shard = order.choice(shards)
            _, descriptor = store.open(shard)
            assert os.pread(descriptor, shard.filesize, 0) == near(shard, far)
            os.close(descriptor)
            assert cached(cache) <= cap
        assert store.counts.shards > 3

    assert in_processes(2, work) == [0, 0]


def test_a_shard_larger_than_the_cap_is_refused_by_the_key(far: Served) -> None:
    shard = first(far)
    with pytest.raises(ConfigError, match=r"data.cache_gib = 0.0001: one shard has [\d,]+ bytes.*may take 107,374"):
        ShardStore(0.0001).path(shard)


def test_without_a_cap_three_quarters_of_what_is_free_may_be_used(
    far: Served, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, b, c, *_) = load_index(far.url).shards
    store = ShardStore()
    store.path(a)
    usage = type("Usage", (), {"free": 2 * a.filesize})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)  # 3/4 of (2 + 1) shards: two fit
    store.path(b)
    usage.free = a.filesize
    store.path(c)
    assert {path.stem for path in (cache / "shards").iterdir()} == {b.sha256, c.sha256}
    usage.free = -2 * a.filesize
    with pytest.raises(NodeError, match=r"data.cache_gib = 0 .three quarters of what is free.*set ORCHESTRATOR_CACHE"):
        store.path(a)


def test_a_full_disk_is_the_nodes_fault(far: Served, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = first(far)
    with full_disk(cache, 512 << 10) as real:
        if not real:
            monkeypatch.setattr("os.ftruncate", refuse_space)
        with pytest.raises(NodeError, match=r"disk full|may take") as caught:
            ShardStore(1).path(shard)
        assert caught.value.exit_code == 44
        assert [path for path in cache.rglob("*") if path.is_file()] == []


def refuse_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


class full_disk:
    """A file system of this size at `folder`, where this process may mount one."""

    def __init__(self, folder: Path, size: int):
        self._folder, self._size = folder, size

    def __enter__(self) -> bool:
        import ctypes

        self._folder.mkdir(exist_ok=True)
        self._libc = ctypes.CDLL(None, use_errno=True)
        options = f"size={self._size}".encode()
        self._real = self._libc.mount(b"none", bytes(self._folder), b"tmpfs", 0, options) == 0
        return self._real

    def __exit__(self, *_: object) -> None:
        if self._real:
            assert self._libc.umount2(bytes(self._folder), 2) == 0


def test_a_cache_that_cannot_be_written_is_the_users_fault(
    far: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot keep http.*set ORCHESTRATOR_CACHE to a writable folder"):
        local_path(first(far))


def kill_while_downloading(shard: Shard, delay_s: float) -> bool:
    """Kill -9 a process that downloads; whether it was still at it."""
    process = FORK.Process(target=local_path, args=(shard,))
    process.start()
    time.sleep(delay_s)
    assert process.pid
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(i, marks=pytest.mark.slow) for i in range(4, 20))])
def test_a_killed_download_leaves_no_half_shard_and_is_cleaned_up(far: Served, cache: Path, seed: int) -> None:
    (shard, other, *_) = load_index(far.url).shards
    far.pace_s = 0.02  # 13 pieces: at least 0.26 s
    fired = kill_while_downloading(shard, random.Random(seed).uniform(0.02, 0.25))
    assert fired
    target = Cache().path(shard)
    assert not target.exists() or target.read_bytes() == near(shard, far)
    far.pace_s = 0
    assert local_path(other).read_bytes() == near(other, far)
    assert list((cache / "partial").iterdir()) == []  # the leftover went when room was made
    assert local_path(shard).read_bytes() == near(shard, far)


def test_who_waits_for_a_download_takes_over_when_it_is_killed(far: Served) -> None:
    shard = first(far)
    far.pace_s = 0.05
    process = FORK.Process(target=local_path, args=(shard,))
    process.start()
    while not far.ranges():
        time.sleep(0.01)
    waiting = FORK.Process(target=local_path, args=(shard,))
    waiting.start()
    time.sleep(0.2)
    assert far.ranges() == [None]
    process.kill()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    waiting.join(30)
    assert waiting.exitcode == 0
    assert far.ranges() == [None, None]


def test_a_range_is_asked_for_and_its_place_reported(far: Served) -> None:
    shard = first(far)
    reply = open_at(shard.location, 1000, None, 5)
    assert (reply.start, reply.total) == (1000, shard.filesize)
    assert near(shard, far)[1000:].startswith(reply.read())
    reply.close()
