"""Existing tars become crop-ready: the same members and pixels, each image accounted for, killed at any moment."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jpegs import by_pillow, jpeg, picture, pillow_jpeg, require_kernel
from PIL import Image

from orchestrator.cli.main import main
from orchestrator.data.convert import DAMAGED, GROWS, NO_JPEG, READY, SPECIAL, ConvertOptions, convert_shards
from orchestrator.data.crop_ready import is_available, is_ready
from orchestrator.data.images import MAX_PIXELS
from orchestrator.data.index import load_index, load_members
from orchestrator.data.indexing import index_tars
from orchestrator.data.verify import verify_set
from orchestrator.errors import EXIT_USER, ConfigError, DataError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

needs_kernel = pytest.mark.skipif(not is_available(), reason="no compiled kernel here")


def quiet(description: str, total: int, unit: str) -> Any:
    return nullcontext(lambda n: None)


def convert(source: Path | str, out: Path, **options: Any) -> dict[str, Any]:
    return convert_shards(str(source), out, ConvertOptions(**options), quiet)


def add(tar: tarfile.TarFile, name: str, data: bytes, **facts: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def encoded(pixels: np.ndarray, kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def kinds() -> dict[str, tuple[str, bytes, str | None]]:
    """name -> (extension, bytes, why it stays, or None)."""
    pixels, exif = picture(150, 90), Image.Exif()
    exif[0x0112] = 6
    plain = jpeg(pixels)
    return {
        "plain": ("jpg", plain, None),
        "upper": ("JPG", jpeg(picture(131, 97), "444"), None),
        "gray": ("jpeg", jpeg(pixels, "Gray"), None),
        "progressive": ("jpg", pillow_jpeg(pixels, progressive=True), None),
        "ready": ("jpg", require_kernel().rewrite(plain, 2) or b"", READY),
        "grows": ("jpg", pillow_jpeg(np.full((64, 8 * 97, 3), 9, np.uint8), optimize=True, quality=5), GROWS),
        "png": ("png", encoded(pixels, "PNG"), NO_JPEG),
        "webp": ("webp", encoded(pixels, "WEBP"), NO_JPEG),
        "misnamed": ("jpg", encoded(pixels, "PNG"), NO_JPEG),
        "cmyk": ("jpg", encoded(pixels, "JPEG", "CMYK"), SPECIAL),
        "turned": ("jpg", encoded(pixels, "JPEG", exif=exif), SPECIAL),
        "cut": ("jpg", plain[: len(plain) // 2], DAMAGED),
        "text": ("jpg", b"<html>", DAMAGED),
        "empty": ("jpg", b"", DAMAGED),
        "giant": ("jpg", plain.replace(b"\x00\x5a\x00\x96", b"\xff\xff\xff\xff", 1), DAMAGED),
    }


LONG = "a/very/" + "long/" * 30


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Two tars with every kind of image and of member; GNU and PAX headers, folders, links and times."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        with tarfile.open(folder / f"x-{number}.tar", "w", format=form) as tar:
            add(tar, "folder", b"", type=tarfile.DIRTYPE)
            add(tar, ".hidden", b"secret")
            for label, (name, (extension, data, _)) in enumerate(kinds().items()):
                key = f"{LONG if label % 2 else ''}ü{name}"
                add(tar, f"{key}.json", json.dumps({"name": name}).encode(), mtime=1.5 if number == 0 else 2)
                add(tar, f"{key}.{extension}", data, mode=0o640, uid=7, uname="me", mtime=1234567890)
                add(tar, f"{key}.cls", str(label % 5).encode())
            add(tar, "link", b"", type=tarfile.SYMTYPE, linkname="folder")
            add(tar, "__meta__/readme.txt", b"x" * 3000)
    return folder


def members_of(tar: Path) -> list[tuple[str, Any, bytes]]:
    """(name, everything of the header but size, offsets and checksum, bytes) of each member."""
    with tarfile.open(tar) as file:
        return [
            (
                info.name,
                (info.mode, info.uid, info.uname, info.mtime, info.type, info.linkname),
                (file.extractfile(info) or io.BytesIO()).read() if info.isreg() else b"",
            )
            for info in file
        ]


@needs_kernel
@pytest.mark.parametrize("indexed", [False, True])
def test_every_member_stays_in_its_place_and_only_jpegs_change_without_loss(
    odd: Path, tmp_path: Path, indexed: bool
) -> None:
    if indexed:
        index_tars(str(odd), "cls", None, lambda n: None)
    body = convert(odd, tmp_path / "out")
    wanted = {name: (data, why) for name, (_, data, why) in kinds().items()}
    for number in (0, 1):
        before, after = (members_of(folder / f"x-{number}.tar") for folder in (odd, tmp_path / "out"))
        assert [member[:2] for member in after] == [member[:2] for member in before]
        for (name, _, old), (_, _, new) in zip(before, after, strict=True):
            data, why = wanted.get(name.rpartition("ü")[2].split(".")[0], (b"", ""))
            if old == data and why is None:
                assert old != new
                facts = require_kernel().describe(new)
                assert facts is not None
                assert is_ready(facts)
                assert np.array_equal(by_pillow(new), by_pillow(old))
            else:
                assert new == old, name
    reasons = [why for _, _, why in kinds().values()]
    left = {why: 2 * reasons.count(why) for why in set(reasons) - {None}}
    assert body["conversion"]["left"] == left
    assert body["conversion"]["images"] == 2 * len(kinds()) == 2 * reasons.count(None) + sum(left.values())
    assert body["converted"] == {"crop_ready": 2 * reasons.count(None)}
    damaged = body["conversion"]["damaged"]
    assert len(damaged) == 8
    assert any("x-1.tar" in line and "cut.jpg at byte" in line and "truncated" in line for line in damaged)
    assert any("claims 65,535 x 65,535" in line for line in damaged)


@needs_kernel
def test_the_new_set_is_whole_and_reads_like_the_old_one(odd: Path, tmp_path: Path) -> None:
    index_tars(str(odd), "cls", None, lambda n: None)
    convert(odd, tmp_path / "out")
    old, new = load_index(str(odd)), load_index(str(tmp_path / "out"))
    assert (new.classes, new.class_counts, new.num_samples) == (old.classes, old.class_counts, old.num_samples)
    for before, after in zip(old.shards, new.shards, strict=True):
        a, b = load_members(Path(before.location), before), load_members(Path(after.location), after)
        assert (a.keys, a.extension, a.label.tolist()) == (b.keys, b.extension, b.label.tolist())
    faults = verify_set(new, MAX_PIXELS, lambda n: None)
    assert {fault.member.rpartition("ü")[2] for fault in faults if fault.member} == {
        "cut.jpg", "text.jpg", "empty.jpg", "giant.jpg"
    }  # fmt: skip
    assert len(faults) == 8
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "shards.json", "x-0.crc", "x-0.idx", "x-0.tar", "x-1.crc", "x-1.idx", "x-1.tar"
    ]  # fmt: skip


@needs_kernel
def test_sizes_and_quality_re_encode_as_packing_does(odd: Path, tmp_path: Path) -> None:
    small = convert(odd, tmp_path / "small", short_side=45)
    assert small["converted"]["resized"] >= 2 * 6
    assert small["conversion"]["left"] == {NO_JPEG: 6, DAMAGED: 8}
    assert small["conversion"]["bytes_after"] < small["conversion"]["bytes_before"]
    low = convert(odd, tmp_path / "low", quality=20, max_side=1000)
    assert "resized" not in low["converted"]
    for name, _, data in members_of(tmp_path / "small/x-0.tar"):
        if name.endswith("üplain.jpg"):
            assert by_pillow(data).shape == (45, 75, 3)
        if name.endswith("üturned.jpg"):
            assert by_pillow(data).shape == (75, 45, 3)


@needs_kernel
def test_converting_again_changes_nothing_and_the_order_of_work_does_not_matter(odd: Path, tmp_path: Path) -> None:
    convert(odd, tmp_path / "one", workers=1)
    convert(odd, tmp_path / "two", workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    convert(odd, tmp_path / "one")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()} == before
    again = convert(tmp_path / "one", tmp_path / "again")
    assert not again["converted"]
    assert {n: d for n, d in tree(tmp_path / "again").items() if n.endswith("tar")} == {
        n: d for n, d in tree(tmp_path / "one").items() if n.endswith("tar")
    }
    with pytest.raises(DataError, match="holds another shard set, which `shards convert` does not overwrite"):
        convert(odd, tmp_path / "one", quality=50)


def small_set(folder: Path, tars: int, images: int, label: str = "cls") -> Path:
    folder.mkdir()
    for number in range(tars):
        with tarfile.open(folder / f"x-{number:03d}.tar", "w") as tar:
            for i in range(images):
                add(tar, f"{i:03d}.jpg", jpeg(picture(200 + 10 * number, 150 + i)))
                add(tar, f"{i:03d}.{label}", str(i % 3).encode())
    return folder


@needs_kernel
def test_labels_classes_and_name_come_from_the_index_and_a_pattern_takes_some(tmp_path: Path) -> None:
    folder = small_set(tmp_path / "in", 3, 4, "label")
    (tmp_path / "names").write_text("ant\nbee\ncat\ndog\n")
    index_tars(str(folder), "label", str(tmp_path / "names"), lambda n: None)
    convert(f"{folder}/x-{{000..001}}.tar", tmp_path / "out")
    new = load_index(str(tmp_path / "out"))
    assert (new.name, new.classes, new.class_counts) == ("in", ("ant", "bee", "cat", "dog"), (4, 2, 2, 0))
    assert [shard.label for shard in new.shards] == ["label", "label"]
    assert all(load_members(Path(s.location), s).label.tolist() == [0, 1, 2, 0] for s in new.shards)


@needs_kernel
def test_what_cannot_be_converted_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = small_set(tmp_path / "in", 2, 3)
    for source, out, message in [
        (folder, folder, "is where the tars lie"),
        (folder, folder / ".." / "in", "is where the tars lie"),
        (tmp_path / "nowhere", tmp_path / "out", "1 tars do not exist"),
        (tmp_path, tmp_path / "out", "no .tar there"),
        (f"{folder}/x-{{000..005}}.tar", tmp_path / "out", "4 tars do not exist"),
        ("https://example.org/x.tar", tmp_path / "out", "only local tars"),
        (small_set(tmp_path / "unlabelled", 1, 2, "txt"), tmp_path / "out", "0 cls labels, must be 1"),
    ]:
        with pytest.raises(DataError, match=message):
            convert(source, out)
    index_tars(str(folder), "cls", None, lambda n: None)
    with (folder / "x-001.tar").open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(DataError, match="index stale"):
        convert(folder, tmp_path / "out")
    (folder / "x-001.tar").unlink()
    with pytest.raises(DataError, match="1 of it do not exist"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--short-side = 0"):
        ConvertOptions(short_side=0)


@needs_kernel
@pytest.mark.parametrize("indexed", [False, True])
def test_a_damaged_tar_is_named_and_leaves_no_index(tmp_path: Path, indexed: bool) -> None:
    folder = small_set(tmp_path / "in", 2, 4)
    path = folder / "x-001.tar"
    if indexed:
        index_tars(str(folder), "cls", None, lambda n: None)
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"x-001\.tar: (sha256 is|not a readable tar|damaged or cut short)"):
            convert(folder, tmp_path / "out", workers=workers)
        assert not (tmp_path / "out/shards.json").exists()
        assert list((tmp_path / "out").glob(".*.tmp")) == []


@needs_kernel
@pytest.mark.parametrize("lost", ["nothing", "tar", "half of the tar", "idx", "facts"])
def test_after_a_failure_whole_shards_are_kept_and_others_written_again(tmp_path: Path, lost: str) -> None:
    folder, out = small_set(tmp_path / "in", 3, 3), tmp_path / "out"
    index_tars(str(folder), "cls", None, lambda n: None)
    convert(folder, tmp_path / "wanted")
    whole = (folder / "x-002.tar").read_bytes()
    (folder / "x-002.tar").write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(DataError, match=r"x-002\.tar: sha256 is"):
        convert(folder, out, workers=1)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("x-*.tar")}
    assert len(kept) == 2
    match lost:
        case "tar":
            (out / "x-000.tar").unlink()
        case "half of the tar":
            os.truncate(out / "x-000.tar", 5000)
        case "idx":
            (out / "x-000.idx").unlink()
        case "facts":
            (out / ".parts/x-000.json").unlink()
    (folder / "x-002.tar").write_bytes(whole)
    convert(folder, out, workers=1)
    assert tree(out) == tree(tmp_path / "wanted")
    for path, written in kept.items():
        assert (path.stat().st_mtime_ns == written) == (path.name == "x-001.tar" or lost == "nothing")


def test_without_the_kernel_it_says_what_to_do_and_writes_nothing(tmp_path: Path) -> None:
    folder = small_set(tmp_path / "in", 1, 2)
    told = run("convert", str(folder), str(tmp_path / "out"), ORCHESTRATOR_KERNEL="off")
    assert told.returncode == EXIT_USER
    assert told.stderr.startswith("error: shards convert: rewriting JPEGs takes the compiled kernel")
    assert "Way out: install a C compiler" in told.stderr
    assert not (tmp_path / "out").exists()


@needs_kernel
def test_the_verb_prints_what_became_of_the_images(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "convert", str(odd), str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["images"], plan["shards"]) == (2 * len(kinds()), 2)
    assert not (tmp_path / "out").exists()
    assert main(["shards", "convert", str(odd), str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    lines = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in told.out.splitlines() if "│" in line}
    assert (lines["images"], lines["rewritten"], lines["of them crop_ready"]) == ("30", "8", "8")
    assert (lines["left as they were: no JPEG"], lines["left as they were: damaged"]) == ("6", "8")
    assert 0.9 < float(lines["bytes after / before"]) < 1.1
    assert "8 damaged images stay as they were" in told.err
    assert main(["shards", "convert", str(odd), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conversion"]["images"] == 30


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator.cli.main", "shards", *arguments]
    return subprocess.run(
        command, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=120, check=False
    )


def moments(count: int, within_s: float) -> Iterator[float]:
    draw = random.Random(count)
    for i in range(count):
        yield (i + draw.random()) * within_s / count


def start(source: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    """Returns when the first tar is being written."""
    command = [sys.executable, "-m", "orchestrator.cli.main", "shards", "convert", str(source), str(out)]
    process = subprocess.Popen(
        [*command, "--workers", str(workers)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 30
    while not any(out.glob(".x-*.tmp")):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
    return process


def kill_and_go_on(source: Path, out: Path, wanted: dict[str, bytes], count: int, workers: int) -> None:
    """Kill one conversion at several moments of its work, then let it end."""
    started = start(source, out.with_name("timed"), workers)
    began = time.monotonic()
    assert started.wait() == 0
    work_s = time.monotonic() - began
    killed = unfinished = 0
    for after_s in moments(count, work_s):
        target = out.with_name(f"{out.name}-{killed}")
        process = start(source, target, workers)
        time.sleep(after_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        unfinished += target.exists() and not (target / "shards.json").exists()
        for tar in target.glob("*.tar"):
            assert wanted[tar.name] == tar.read_bytes(), "a tar under its own name is whole"
        time.sleep(0.3 if workers > 1 else 0)  # its processes end with it
        done = run("convert", str(source), str(target), "--workers", str(workers))
        assert done.returncode == 0, done.stderr
        assert tree(target) == wanted
    assert unfinished, f"none of {killed} kills met a conversion at work"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    base = tmp_path_factory.mktemp("large")
    folder = base / "in"
    folder.mkdir()
    pixels = picture(900, 700)
    images = [jpeg(pixels[i:, i:], "420", 90) for i in range(9)]
    for number in range(6):
        with tarfile.open(folder / f"x-{number}.tar", "w") as tar:
            for i, data in enumerate(images):
                add(tar, f"{i:03d}.jpg", data)
                add(tar, f"{i:03d}.cls", b"1")
    convert(folder, base / "wanted", workers=1)
    return folder, tree(base / "wanted")


@needs_kernel
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_a_few_moments_it_goes_on_to_the_same_bytes(
    large: tuple[Path, dict[str, bytes]], tmp_path: Path, workers: int
) -> None:
    kill_and_go_on(large[0], tmp_path / "out", large[1], 2, workers)


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_twenty_moments_it_goes_on_to_the_same_bytes(
    large: tuple[Path, dict[str, bytes]], tmp_path: Path, workers: int
) -> None:
    kill_and_go_on(large[0], tmp_path / "out", large[1], 20, workers)
