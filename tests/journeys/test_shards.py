"""`orchestrator shards` as a user types it, with real processes, kills and a disk that is full."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.cli.main import main
from orchestrator.data.index import load_index
from orchestrator.data.members import scan_members

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
EXIT_USER, EXIT_NODE = 42, 44


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 noisy photos of 2 classes: a few hundredths of a second each to re-encode."""
    root = tmp_path_factory.mktemp("photos") / "photos"
    random = np.random.default_rng(0)
    for i in range(48):
        path = root / f"class_{i % 2}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (300, 400, 3), np.uint8)).save(path, quality=80)
    return root


def command(source: Path | str, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "jobs.make_shards", str(source), str(out), *flags]


def pack(source: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(source, out, *flags), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FLAGS = ("--samples-per-shard", "4", "--quality", "70")


@pytest.fixture(scope="module")
def reference(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("reference") / "out"
    done = pack(photos, out, *FLAGS, "--workers", "1")
    assert done.returncode == 0, done.stderr
    return tree(out)


def test_two_processes_write_the_bytes_of_one(photos: Path, tmp_path: Path, reference: dict[str, bytes]):
    done = pack(photos, tmp_path / "out", *FLAGS, "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == reference
    assert len(reference) == 3 * (11 + 1) + 2  # tar, idx, crc, and two indices
    assert json.loads(done.stdout)["splits"]["train"]["class_counts"] == [22, 22]


@pytest.mark.parametrize(("workers", "finished_shards"), [(1, 0), (1, 3), (2, 2), (2, 6)])
def test_a_killed_packing_goes_on_and_ends_in_the_same_bytes(
    photos: Path, tmp_path: Path, reference: dict[str, bytes], workers: int, finished_shards: int
):
    out = tmp_path / "out"
    flags = (*FLAGS, "--workers", str(workers))
    process = subprocess.Popen(command(photos, out, *flags), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    wait_until(lambda: has_finished(out, finished_shards) if finished_shards else has_begun(out))
    children = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("train/.parts/train-*.json")}
    assert not (out / "train/shards.json").exists()
    wait_until(lambda: not any(map(is_alive, children)))
    done = pack(photos, out, *flags)
    assert done.returncode == 0, done.stderr
    assert tree(out) == reference
    assert len(kept) >= finished_shards - 1
    for name, written in kept.items():
        assert (out / "train" / name).with_suffix(".tar").stat().st_mtime_ns < written


def has_begun(out: Path) -> bool:
    return any(out.glob("train/.train-*.tmp"))


def has_finished(out: Path, shards: int) -> bool:
    return len(list(out.glob("train/train-*.tar"))) >= shards


def children_of(pid: int) -> list[int]:
    return [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: object, seconds: float = 30) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def test_ctrl_c_ends_all_processes_at_once_and_leaves_no_half_written_file(photos: Path, tmp_path: Path):
    many = tmp_path / "many"  # so that there is work left when the signal comes, however late
    for path in photos.rglob("*.jpg"):
        (many / path.parent.name).mkdir(parents=True, exist_ok=True)
        for copy in range(20):
            (many / path.parent.name / f"{copy:02d}-{path.name}").symlink_to(path)
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(many, out, *FLAGS, "--workers", "2"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: has_begun(out))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, "Traceback" in errors) == (130, False), errors
    assert list(tmp_path.rglob("*.tmp")) == []


def test_two_packings_into_one_folder_do_not_mix(photos: Path, tmp_path: Path):
    first = subprocess.Popen(command(photos, tmp_path, *FLAGS), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / "train").exists())
    second = pack(photos, tmp_path, *FLAGS)
    assert (second.returncode, "another `shards make` is writing here" in second.stderr) == (EXIT_USER, True)
    assert first.wait(60) == 0


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0,
    reason="no user namespaces here, so no small disk to fill",
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_the_machines_fault_and_the_same_command_goes_on(
    photos: Path, tmp_path: Path, reference: dict[str, bytes], workers: str
):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=900k none {disk} && "
        f'("$@"; echo "code $?"; find {disk} -name "*.tmp" -o -name .scratch; '
        f'mount -o remount,size=64m {disk}; "$@" >&2 && cp -r {disk}/out {tmp_path}/copy)'
    )
    again = command(photos, disk / "out", *FLAGS, "--workers", workers)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *again], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout.split("\n") == [f"code {EXIT_NODE}", ""], done.stderr
    assert "disk full. Way out" in done.stderr
    assert tree(tmp_path / "copy") == reference


def test_tars_made_by_others_are_indexed_verified_and_shown(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for shard in range(2):
        with tarfile.open(tmp_path / f"web-{shard}.tar", "w") as tar:
            for i, path in enumerate(sorted(photos.rglob("*.jpg"))[shard * 3 : shard * 3 + 3]):
                (tmp_path / "label").write_text(f"{i}\n")
                tar.add(path, f"./{path.stem}.jpg")
                tar.add(tmp_path / "label", f"./{path.stem}.id")
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    names = str(tmp_path / "names.txt")
    assert main(["shards", "index", str(tmp_path / "web-{0..1}.tar"), "--label", "id", "--classes", names]) == 0
    index = load_index(str(tmp_path))
    assert (index.num_samples, index.classes, index.class_counts) == (6, ("ant", "bee", "cow"), (2, 2, 2))
    assert main(["shards", "verify", str(tmp_path)]) == 0
    assert main(["shards", "inspect", str(tmp_path), "--png", str(tmp_path / "sheet.png"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["sets"][0]
    assert facts["class_counts"] == {"ant": 2, "bee": 2, "cow": 2}
    assert facts["size_histogram"] == {"400x300": 6}
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)
    assert len(colours) > 10_000, "noise photos must show on the sheet"
    assert main(["shards", "index", str(tmp_path), "--label", "id"]) == 0
    assert load_index(str(tmp_path)) == index, "indexing again keeps the names"
    capsys.readouterr()
    assert main(["shards", "index", str(tmp_path), "--label", "cls"]) == EXIT_USER
    assert "0 cls labels, must be 1" in capsys.readouterr().err


def test_verify_names_shard_member_and_offset_of_each_fault(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert pack(photos, out, *FLAGS, "--workers", "1").returncode == 0
    assert main(["shards", "verify", str(out)]) == 0
    victim = out / "train/train-000004.tar"
    image = [member for member in scan_members(victim) if member.extension == "jpg"][1]
    data = bytearray(victim.read_bytes())
    data[image.offset : image.offset + 2] = b"xx"
    victim.write_bytes(data)
    (out / "train/train-000006.tar").unlink()
    (out / "val/val-000000.tar").write_bytes((out / "val/val-000000.tar").read_bytes()[:-512])
    capsys.readouterr()
    assert main(["shards", "verify", str(out), "--json"]) == EXIT_USER
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert [(Path(f["shard"]).name, f["member"], f["offset"]) for f in faults] == [
        ("train-000004.tar", None, None),
        ("train-000004.tar", image.name, image.offset),
        ("train-000006.tar", None, None),
        ("val-000000.tar", None, None),
    ]
    for fault, words in zip(
        faults, ("sha256 is", "not a readable", "does not exist", "damaged: cut short"), strict=True
    ):
        assert words in fault["fault"]
    assert main(["shards", "verify", str(out)]) == EXIT_USER
    assert f"{image.name} at byte {image.offset:,}: not a readable" in capsys.readouterr().err


def test_a_label_without_a_class_is_a_fault(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert pack(photos, tmp_path / "out", *FLAGS, "--workers", "1").returncode == 0
    path = tmp_path / "out/val/shards.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {"classes": body["classes"][:1], "class_counts": body["class_counts"][:1]}))
    assert main(["shards", "verify", str(path.parent)]) == EXIT_USER
    assert "label 1, but there are 1 classes" in capsys.readouterr().err


def test_inspect_counts_what_lies_in_the_set(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["shards", "make", str(photos), str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["val"] == {"samples": 4, "shards": 1}
    assert main(["shards", "make", str(photos), str(tmp_path / "out"), "--max-side", "40"]) == 0
    assert main(["shards", "inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for words in (
        "photos-train: 44 samples, 2 classes",
        "photos-val: 4 samples",
        "40x30",
        "resized",
        "train-000000.tar",
    ):
        assert words in shown


@pytest.mark.slow
def test_real_cifar_images_survive_the_way_into_shards(shared_data: Path, tmp_path: Path):
    archive = shared_data / "cifar10-jpeg-20k.tar.gz"
    done = pack(archive, tmp_path, "--workers", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"]["train"]["class_counts"] == [1000] * 10
    shard = load_index(str(tmp_path / "val")).shards[0]
    stored = {}
    with tarfile.open(archive) as source, open(shard.location, "rb") as tar:
        for member in scan_members(Path(shard.location)):
            if member.extension == "jpg":
                tar.seek(member.offset)
                stored[member.key] = tar.read(member.size)
        for info in source:
            if "/test/" in info.name and info.isreg():
                file = source.extractfile(info)
                assert file is not None
                assert stored.pop(info.name.split("/test/")[1].removesuffix(".jpg")) == file.read()
    assert stored == {}
