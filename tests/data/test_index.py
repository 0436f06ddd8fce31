"""Indices and members: what is read equals what lies in the tars, and what does not fit is named."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.fetch import local_path
from orchestrator.data.index import Shard, load_index, load_members
from orchestrator.data.indexing import index_tars
from orchestrator.data.members import group_samples, read_idx, scan_members, split_name, write_idx
from orchestrator.errors import DataError

Files = list[tuple[str, bytes]]
PLAIN: Files = [("a.cls", b"1"), ("a.jpg", b"AAAA"), ("b.cls", b"0\n"), ("b.png", b"B" * 700)]


def write_tar(path: Path, files: Files, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(data))
    return path


def nothing(_: int) -> None:
    pass


def make_set(folder: Path, shards: list[Files]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, files in enumerate(shards):
        write_tar(folder / f"x-{i:03d}.tar", files)
    index_tars(str(folder), "cls", None, nothing)
    return folder


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "shards.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return make_set(tmp_path / "two", [PLAIN, [("c.cls", b"2"), ("c.webp", b"C")]])


@pytest.fixture
def served(two: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(two))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("dir.with.dots/a.b.JPG", ("dir.with.dots/a", "b.jpg")),
        ("x/y/0001.cls", ("x/y/0001", "cls")),
        (".hidden", None),
        ("d/.hidden.jpg", None),
        ("README", None),
        ("__meta__/x.json", None),
    ],
)
def test_a_key_ends_at_the_first_dot_of_the_base_name(name: str, expected: tuple[str, str] | None):
    assert split_name(name) == expected


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_point_at_the_bytes_whatever_the_tar_format(tmp_path: Path, format: int):
    long = "d/" * 30 + "é" * 60 if format != tarfile.USTAR_FORMAT else "d/" * 60 + "k" * 60
    files = [("d/", b""), ("notes", b"-"), (f"{long}.cls", b"7"), (f"{long}.jpg", b"long" * 200),
             ("a.b/k.jpg", b"x"), ("a.b/k.cls", b"12"), ("a.b/k.pickle", b"never opened")]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", files, format)
    members = load_members(path, Shard(str(path), 2, path.stat().st_size, ""))
    data = path.read_bytes()
    found = [data[o : o + n] for o, n in zip(members.image_offset, members.image_size, strict=True)]
    assert found == [b"long" * 200, b"x"]
    assert members.keys == [long, "a.b/k"]
    assert members.label.tolist() == [7, 12]
    assert members.extension == ["jpg", "jpg"]


def test_idx_holds_the_offsets_of_a_tarfile_scan_in_the_form_of_dali(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", PLAIN)
    samples = list(group_samples(scan_members(path)))
    write_idx(path.with_suffix(".idx"), samples)
    with tarfile.open(path) as tar:
        words = [f"{m.name.split('.')[1]} {m.offset_data} {m.size} {m.name}" for m in tar]
    assert path.with_suffix(".idx").read_text() == f"v1.2 2\n{words[0]} {words[1]}\n{words[2]} {words[3]}\n"
    assert read_idx(path.with_suffix(".idx"), path.stat().st_size) == samples


@pytest.mark.parametrize(
    "content",
    [
        "",
        "v1.1 2\n",
        "v1.2 3\n{0}",
        "v1.2 2\nrubbish\n",
        "v1.2 2\ncls 512 1 a.cls jpg 99999999 4 a.jpg\n",
        "v1.2 x\n{0}",
    ],
)
def test_an_idx_that_does_not_fit_its_tar_is_not_believed(tmp_path: Path, content: str):
    path = write_tar(tmp_path / "x.tar", PLAIN)
    shard = Shard(str(path), 2, path.stat().st_size, "")
    expected = load_members(path, shard)
    path.with_suffix(".idx").write_text(content.format("cls 512 1 a.cls jpg 1536 4 a.jpg\n"))
    found = load_members(path, shard)
    assert (found.keys, found.image_offset.tolist()) == (expected.keys, expected.image_offset.tolist())


def test_the_idx_of_an_older_tar_of_equal_size_is_not_believed(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", PLAIN)
    write_idx(path.with_suffix(".idx"), list(group_samples(scan_members(path))))
    write_tar(path, PLAIN[2:] + PLAIN[:2])
    assert load_members(path, Shard(str(path), 2, path.stat().st_size, "")).keys == ["b", "a"]


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ([("a.cls", b"1")], "0 images"),
        ([("a.jpg", b"x")], "0 cls labels"),
        ([("a.jpg", b"x"), ("a.png", b"y"), ("a.cls", b"1")], "2 images"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "label b'-1' is not an integer from 0 up"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "label 'cat'"),
        ([("a.jpg", b"x"), ("a.cls", b"")], "label b''"),
        ([("a.jpg", b"x"), ("a.cls", b"9" * 30)], "label b'99999"),
    ],
)
def test_a_sample_that_is_not_one_image_and_one_label_is_named(tmp_path: Path, files: Files, fault: str):
    path = write_tar(tmp_path / "x.tar", [*PLAIN[2:], *files])
    with pytest.raises(DataError, match=fault) as caught:
        load_members(path, Shard(str(path), 2, path.stat().st_size, ""))
    assert "sample a at byte 3,072" in str(caught.value)


def test_a_tar_cut_at_any_place_is_refused(tmp_path: Path):
    whole = write_tar(tmp_path / "x.tar", PLAIN).read_bytes()
    for length in (0, 100, 512, 700, 1024, 2048, 3000, 4096, 4608):
        cut = tmp_path / "cut.tar"
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"readable tar|cut short"):
            list(scan_members(cut))


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", PLAIN)
    data = bytearray(path.read_bytes())
    data[2048 + 5] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged or cut short at byte 2,048"):
        list(scan_members(path))


def test_folder_file_and_pattern_name_the_same_set(two: Path):
    whole = load_index(str(two))
    assert load_index(str(two / "shards.json")) == whole
    assert load_index(str(two / "x-{000..001}.tar")).shards == whole.shards
    part = load_index(str(two / "x-{001..001}.tar"))
    assert (part.num_samples, part.num_classes, whole.num_samples) == (1, 3, 3)
    assert whole.class_counts == (1, 1, 1)
    assert part.digest != whole.digest


def test_the_digest_knows_the_data_and_not_its_place(two: Path, tmp_path: Path):
    moved = make_set(tmp_path / "elsewhere", [PLAIN, [("c.cls", b"2"), ("c.webp", b"C")]])
    other = make_set(tmp_path / "other", [PLAIN, [("c.cls", b"2"), ("c.webp", b"D")]])
    assert load_index(str(moved)).digest == load_index(str(two)).digest != load_index(str(other)).digest


def test_a_stale_index_names_the_shard_both_numbers_and_the_way_out(two: Path):
    (first, second) = load_index(str(two)).shards
    write_tar(Path(first.location), PLAIN * 9)
    with pytest.raises(
        DataError, match=rf"index stale: .*x-000.tar has [\d,]+ bytes, the index says {first.filesize:,}"
    ):
        local_path(first)
    with pytest.raises(
        DataError, match=r"index stale: .* has 1 samples, the index says 5. Way out: `orchestrator shards"
    ):
        load_members(Path(second.location), Shard(second.location, 5, second.filesize, second.sha256))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("absent", "does not exist. Way out: `orchestrator shards make"),
        ("twoo", r"does not exist \(did you mean .*/two\?\). Way out"),
        ("emty/train", r"does not exist \(did you mean .*/empty/train\?\). Way out"),
        ("emty/val", "does not exist. Way out"),
        ("empty", "has no shards.json. Way out: `orchestrator shards make"),
        ("two/x-{000..004}.tar", "3 of 5 shards of the pattern are not in the index"),
        ("two/x-{000.tar", "nbalanced"),
    ],
)
def test_a_set_that_is_not_there_says_how_to_get_it(two: Path, tmp_path: Path, location: str, message: str):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=message):
        load_index(str(tmp_path / location))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"__kind__": "zip"}, "kind 'zip' is not 'wids-shard-index-v1'"),
        ({"schema": 9}, "schema 9, this version reads 1"),
        ({"shardlist": [{"url": "x.tar", "nsamples": 1, "filesize": 1}]}, "KeyError: 'sha256'"),
        ({"shardlist": []}, "holds no sample"),
        ({"classes": ["a"]}, "1 classes but 3 class_counts"),
        ({"classes": 7}, "not a complete shard index"),
    ],
)
def test_a_malformed_index_says_what_is_wrong(two: Path, changes: dict[str, Any], message: str):
    edit_index(two, **changes)
    with pytest.raises(DataError, match=message):
        load_index(str(two))


@pytest.mark.parametrize("url", ["pipe:touch HACKED", "pipe:touch HACKED; x.tar", "ftp://host/x.tar"])
def test_an_index_cannot_run_commands(two: Path, url: str):
    with pytest.raises(DataError, match="is not read"):
        load_index(url)
    edit_index(two, shardlist=[{"url": url, "nsamples": 1, "filesize": 1, "sha256": "0" * 64}])
    with pytest.raises(DataError, match="is not read"):
        local_path(load_index(str(two)).shards[0])
    assert not Path("HACKED").exists()


def test_shards_behind_a_url_are_fetched_once_and_checked(
    served: str, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    index = load_index(served)
    assert index.digest == load_index(str(two)).digest
    for shard in load_index(f"{served}/x-{{000..001}}.tar").shards:
        path = local_path(shard)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
        assert len(load_members(path, shard).keys) == shard.nsamples
    (two / "x-000.tar").unlink()
    assert local_path(index.shards[0]).parent == tmp_path / "cache" / "shards"
    assert sorted(os.listdir(tmp_path / "cache" / "shards")) == sorted(f"{shard.sha256}.tar" for shard in index.shards)


def test_a_download_of_other_bytes_is_refused_and_leaves_nothing(
    served: str, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("orchestrator.data.transfer.PAUSE_S", 0.01)
    (first, second) = load_index(served).shards
    with pytest.raises(DataError, match="sha256"):
        local_path(Shard(first.location, first.nsamples, first.filesize, "0" * 64))
    with pytest.raises(DataError, match=f"{second.filesize:,} bytes came"):
        local_path(Shard(second.location, 1, 5, second.sha256))
    with pytest.raises(DataError, match="download failed"):
        local_path(Shard(f"{served}/absent.tar", 1, 5, "1" * 64))
    assert os.listdir(tmp_path / "cache" / "shards") == []


def test_many_processes_fetching_the_same_shard_all_get_it_whole(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    shard = load_index(served).shards[0]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch_or_die, args=(shard,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert os.listdir(tmp_path / "shards") == [f"{shard.sha256}.tar"]


def fetch_or_die(shard: Shard) -> None:
    assert hashlib.sha256(local_path(shard).read_bytes()).hexdigest() == shard.sha256
