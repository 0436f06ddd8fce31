"""Nothing is lost in silence: each kind of damage is an error with shard, member and offset, near and far."""

from __future__ import annotations

import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from serving import serving
from test_index import make_set, nothing, write_tar

from orchestrator.data.damage import DamagedShard
from orchestrator.data.index import Shard, ShardIndex, load_index
from orchestrator.data.indexing import index_tars
from orchestrator.data.reader import ShardReader
from orchestrator.data.store import Counts, ShardStore
from orchestrator.data.sums import parse_sums, write_sums
from orchestrator.options import OnDamage

SAMPLES, IMAGE, AT = 6, 1500, 3
"""Each sample: a jpg of 1,500 bytes, then its cls; damage is at sample 3. As in the table of webdataset's losses."""
PER_SAMPLE = 512 + 1536 + 512 + 512
START = AT * PER_SAMPLE
"""Where the header of sample 3's jpg lies; its data 512 bytes on, its cls' header 2,048 on."""


class Kind(NamedTuple):
    """One way to damage a shard, and what must be said of it."""

    damage: Callable[[bytearray], bytearray]
    text: str
    member: str
    offset: int


def flipped(at: int) -> Callable[[bytearray], bytearray]:
    def damage(data: bytearray) -> bytearray:
        data[at] ^= 4
        return data

    return damage


def cut(at: int) -> Callable[[bytearray], bytearray]:
    return lambda data: data[:at]


def zeroed(data: bytearray) -> bytearray:
    data[START : START + 512] = bytes(512)
    return data


KINDS = {
    "cut at a sample's border": Kind(cut(START), "cut short at the border", "s3.jpg", START),
    "cut in a header": Kind(cut(START + 100), "cut short in a header", "s3.jpg", START + 100),
    "cut after the jpg": Kind(cut(START + 2048), "cut short at the border", "s3.cls", START + 2048),
    "header bit flipped": Kind(flipped(START + 3), "broken header", "s3.jpg", START),
    "header zeroed": Kind(zeroed, "header of zeros", "s3.jpg", START),
    "data bit flipped": Kind(flipped(START + 512 + 700), "bytes changed", "s3.jpg", START + 512),
    "cut in the data": Kind(cut(START + 512 + 700), "cut short in the data", "s3.jpg", START + 512 + 700),
    "cut in the padding": Kind(cut(START + 512 + 1510), "cut short in the padding", "s3.jpg", START + 512 + 1510),
    "empty": Kind(cut(0), "empty", "s0.jpg", 0),
}


def image(id: int) -> bytes:
    return np.random.default_rng(id).integers(1, 255, IMAGE, np.uint8).tobytes()


def samples(first: int) -> list[tuple[str, bytes]]:
    ids = range(first, first + SAMPLES)
    return [pair for i in ids for pair in ((f"s{i}.jpg", image(i)), (f"s{i}.cls", b"%d" % (i % 3)))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("orchestrator.data.transfer.PAUSE_S", 0.01)
    return make_set(tmp_path / "set", [samples(0), samples(SAMPLES)])


@pytest.fixture(params=["local", "http"])
def index(request: pytest.FixtureRequest, folder: Path) -> Iterator[ShardIndex]:
    """Two shards, read from the disk or from a web server."""
    if request.param == "local":
        yield load_index(str(folder))
        return
    with serving(folder) as served:
        yield load_index(served.url)


def spoil(folder: Path, kind: Kind) -> None:
    path = folder / "x-000.tar"
    path.write_bytes(kind.damage(bytearray(path.read_bytes())))


def ids_of(shard: int) -> np.ndarray:
    return np.arange(shard * SAMPLES, (shard + 1) * SAMPLES)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_each_damage_is_an_error_with_shard_member_and_offset(index: ShardIndex, folder: Path, kind: Kind) -> None:
    spoil(folder, kind)
    reader = ShardReader(index)
    with pytest.raises(DamagedShard) as caught:
        reader.locate(ids_of(0))
    reader.close()
    place, text = index.shards[0].location, str(caught.value)
    assert text.startswith(f"{place}: damaged: {kind.text}")
    assert f", member {kind.member}, offset {kind.offset:,}. Way out:" in text
    assert caught.value.shard == index.shards[0]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_quarantine_loses_the_damaged_shards_samples_and_counts_them(
    index: ShardIndex, folder: Path, kind: Kind
) -> None:
    spoil(folder, kind)
    reader = ShardReader(index, on_damage=OnDamage.quarantine)
    mixed = np.array([8, 2, 3, 11, 0])
    for _ in range(2):  # the verdict is kept
        found = reader.locate(mixed)
        assert found.lost.tolist() == [False, True, True, False, True]
        for row in (0, 3):
            read = os.pread(int(found.descriptors[row]), int(found.sizes[row]), int(found.offsets[row]))
            assert read == image(int(mixed[row]))
        assert found.descriptors[found.lost].tolist() == [-1] * 3
    counts = reader.take_counts()
    assert (counts.quarantined_shards, counts.quarantined_samples) == (1, 6)
    assert reader.take_counts() == Counts()
    reader.close()


def test_undamaged_shards_are_read_in_full_near_and_far(index: ShardIndex) -> None:
    reader = ShardReader(index)
    assert [reader.read(i).image for i in range(2 * SAMPLES)] == [image(i) for i in range(2 * SAMPLES)]
    reader.close()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_without_the_sums_all_but_the_changed_byte_keeps_its_member(folder: Path, kind: Kind) -> None:
    index = load_index(str(folder))
    (folder / "x-000.crc").unlink()
    spoil(folder, kind)
    with pytest.raises(DamagedShard) as caught:
        ShardStore().path(index.shards[0])
    if kind.text == "bytes changed":
        assert "no x-000.crc lies beside it, so the member that changed cannot be told" in str(caught.value)
    else:
        assert f", member {kind.member}, offset {kind.offset:,}. Way out:" in str(caught.value)


def test_a_change_between_members_is_told_from_one_in_them(folder: Path) -> None:
    index = load_index(str(folder))
    padding = START + 512 + IMAGE + 5
    spoil(folder, Kind(flipped(padding), "", "", 0))
    with pytest.raises(DamagedShard, match="every member is as it was packed: the fault lies between them"):
        ShardStore().path(index.shards[0])


def test_every_byte_of_a_shard_is_watched(folder: Path) -> None:
    """One flipped bit anywhere is noticed, and inside a member's bytes it is that member's."""
    shard = load_index(str(folder)).shards[0]
    path = folder / "x-000.tar"
    whole = path.read_bytes()
    sums = parse_sums((folder / "x-000.crc").read_bytes())
    assert sums
    for at in np.random.default_rng(1).integers(0, len(whole), 40).tolist():
        spoil(folder, Kind(flipped(at), "", "", 0))
        with pytest.raises(DamagedShard) as caught:
            ShardStore().path(shard)
        inside = [member.name for member in sums if member.offset <= at < member.offset + member.size]
        if inside:
            assert caught.value.damage.member == inside[0]
        path.write_bytes(whole)
    assert ShardStore().path(shard) == path


def test_a_header_of_the_first_member_and_long_names_are_told_too(tmp_path: Path) -> None:
    name = "d" * 90 + "/" + "e" * 150
    folder = tmp_path
    files = [(f"{name}{i}.{kind}", b"1") for i in range(3) for kind in ("cls", "jpg")]
    write_tar(folder / "x-000.tar", files, tarfile.PAX_FORMAT)
    index_tars(str(folder), "cls", None, nothing)
    (shard,) = load_index(str(folder)).shards
    sums = parse_sums((folder / "x-000.crc").read_bytes())
    assert sums
    whole = (folder / "x-000.tar").read_bytes()
    for member in (sums[0], sums[3]):
        spoil(folder, Kind(flipped(member.offset - 300), "", "", 0))
        with pytest.raises(DamagedShard, match="broken header") as caught:
            ShardStore().path(shard)
        assert caught.value.damage.member == member.name
        (folder / "x-000.tar").write_bytes(whole)


def test_sums_hold_every_member_and_survive_odd_names(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a b.cls", b"1"), ("a b.jpg", b""), ("ü/c d.json", b"{}")])
    write_sums(path)
    sums = parse_sums(path.with_suffix(".crc").read_bytes())
    assert sums
    assert [(member.name, member.size) for member in sums] == [("a b.cls", 1), ("a b.jpg", 0), ("ü/c d.json", 2)]
    assert [member.offset for member in sums] == [512, 1536, 2048]
    assert sums[0].crc == 0x83DCEFB7  # zlib.crc32(b"1")


@pytest.mark.parametrize("content", [b"", b"crc32 v1 2\nff 1 1 a\n", b"crc32 v2 0\n", b"crc32 v1 1\nxyz\n", b"\xff\n"])
def test_sums_of_another_form_are_none(content: bytes) -> None:
    assert parse_sums(content) is None


def test_an_error_crosses_process_borders_whole(folder: Path) -> None:
    index = load_index(str(folder))
    spoil(folder, KINDS["header zeroed"])
    with pytest.raises(DamagedShard) as caught:
        ShardStore().path(index.shards[0])
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.shard, copy.damage) == (str(caught.value), caught.value.shard, caught.value.damage)


def hashed(store: ShardStore) -> int:
    return store._stamps.hashed


def test_a_local_shard_is_hashed_once_on_this_machine_until_it_changes(folder: Path) -> None:
    (first, second) = load_index(str(folder)).shards
    store = ShardStore()
    for _ in range(3):
        store.path(first)
    assert hashed(store) == first.filesize
    later = ShardStore()
    later.path(first)
    assert hashed(later) == 0
    later.path(second)
    assert hashed(later) == second.filesize
    os.utime(first.location, ns=(1, 1))
    later.path(first)
    assert hashed(later) == first.filesize + second.filesize


def test_a_verdict_on_a_damaged_local_shard_is_kept_too(folder: Path) -> None:
    (first, _) = load_index(str(folder)).shards
    spoil(folder, KINDS["data bit flipped"])
    for expected in (first.filesize, 0):
        store = ShardStore()
        with pytest.raises(DamagedShard, match=r"s3\.jpg"):
            store.path(first)
        assert hashed(store) == expected


def test_stamps_that_a_kill_cut_and_a_closed_cache_only_cost_time(folder: Path, tmp_path: Path) -> None:
    (first, second) = load_index(str(folder)).shards
    ShardStore().path(first)
    (stamps,) = (tmp_path / "cache" / "stamps").iterdir()
    stamps.write_bytes(stamps.read_bytes()[:-20])
    again = ShardStore()
    again.path(first)
    again.path(second)
    assert hashed(again) == first.filesize + second.filesize
    last = ShardStore()
    last.path(first)
    last.path(second)
    assert hashed(last) == 0
    for path in (stamps, stamps.parent):
        path.unlink() if path.is_file() else path.rmdir()
    stamps.parent.write_text("a file in the way")
    assert ShardStore().path(Shard(**as_dict(first))) == Path(first.location)


def as_dict(shard: Shard) -> dict[str, object]:
    return {name: getattr(shard, name) for name in Shard.__dataclass_fields__}


def test_packing_again_after_damage_renews_the_sums(folder: Path) -> None:
    spoil(folder, KINDS["data bit flipped"])
    index_tars(str(folder), "cls", None, nothing)
    shard = load_index(str(folder)).shards[0]
    assert ShardStore().path(shard) == folder / "x-000.tar"
