"""Every mistake ends with its exit code, one clear error with the way out, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from launching import Answer, Cli, Run, Saboteur, files_below

Fixture = pytest.FixtureRequest


def require_refused(answer: Answer, *said: str, code: int = 42) -> None:
    """One error, no traceback, and each of `said` in it."""
    assert answer.code == code, answer.err
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, answer.err
    assert "Traceback" not in answer.err + answer.out
    message = answer.err[answer.err.index("error: ") :]
    for text in (*said, "Way out:"):
        assert text in message, (text, message)


MISTYPED = {
    "key": (["recipe.epoch=2"], ["recipe.epoch = 2", "'recipe.epochs'"]),
    "group": (["modle=resnet18"], ["modle = resnet18", "'model'"]),
    "choice": (["model=resnet19"], ["model = resnet19", "resnet1"]),
    "model": (["model=timm", "model.name=timm/resnet5"], ["model.name = timm/resnet5", "timm/resnet5"]),
    "own-model": (["model.name=cifar_resnet21"], ["model.name = cifar_resnet21", "'cifar_resnet"]),
    "type": (["recipe.epochs=many"], ["recipe.epochs = many", "whole number"]),
    "enum": (["recipe.schedule=cosin"], ["recipe.schedule = cosin", "'cosine'"]),
    "override": (["recipe.epochs=[2"], ["recipe.epochs=[2"]),
    "several-values": (["seed=1,2"], ["seed = 1,2"]),
    "batch-below-processes": (
        ["recipe.global_batch_size=1"],
        ["recipe.global_batch_size = 1", "compute.num_processes = 2"],
    ),
    "batch-below-parts": (["recipe.accumulate=9"], ["recipe.accumulate = 9", "16 images"]),
    "head-below-classes": (["model.num_classes=3"], ["model.num_classes = 3", "4 classes", "model.num_classes=4"]),
    "no-shards": (["data.train=nowhere"], ["nowhere", "does not exist", "orchestrator shards make"]),
    "fp16-on-cpu": (["compute.precision=fp16"], ["compute.precision = fp16", "needs a GPU", "bf16"]),
    "steps-too-small": (
        ["recipe.global_batch_size=60", "compute.num_processes=60"],
        ["recipe.global_batch_size = 60", "60 processes"],
    ),
    "config-dir": (["--config-dir", "nowhere"], ["--config-dir = nowhere", "is not a folder"]),
    "flag": (["--jsno"], ["--jsno"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTYPED)
def test_a_mistyped_command_is_refused_before_anything_is_written(
    cli: Cli, small: tuple[str, ...], mistake: str
) -> None:
    typed, said = MISTYPED[mistake]
    require_refused(cli("train", *small, *typed), *said)
    assert not list(cli.cwd.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(cli: Cli, small: tuple[str, ...]) -> None:
    require_refused(cli("train", *small, "compute.device=cuda"), "compute.device = cuda", "none", "compute.device=auto")
    assert not list(cli.cwd.iterdir())


@pytest.mark.slow
def test_a_mistake_ends_a_process_of_its_own_just_so(cli: Cli) -> None:
    answer = cli.cold("train", "recipe.epoch=2")
    require_refused(answer, "recipe.epoch = 2", "'recipe.epochs'")
    assert answer.err.startswith("error: ")
    assert not answer.out


def test_an_unknown_verb_offers_the_nearest(cli: Cli) -> None:
    require_refused(cli("trian"), "'trian'", "'train'")


def test_an_override_of_a_verb_that_takes_none_is_refused(cli: Cli) -> None:
    require_refused(cli("doctor", "seed=1"), "seed=1")


def test_a_taken_port_is_refused(cli: Cli, small: tuple[str, ...]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        require_refused(cli("train", *small, f"compute.master_port={port}"), f"compute.master_port = {port}", "in use")
    assert not list(cli.cwd.iterdir())


def test_a_file_in_the_place_of_runs_dir_is_refused(cli: Cli, small: tuple[str, ...]) -> None:
    (cli.cwd / "runs").write_text("not a folder")
    require_refused(cli("train", *small), "runs/", "runs_dir")
    assert files_below(cli.cwd) == {"runs": b"not a folder"}


@pytest.fixture
def copied(cli: Cli, shards: Path) -> Path:
    """Shards of this test's own, to spoil."""
    return Path(shutil.copytree(shards, cli.cwd / "data"))


def on(folder: Path) -> list[str]:
    return [f"data.train={folder}/train", f"data.val={folder}/val"]


def edit_index(folder: Path, **values: Any) -> None:
    path = folder / "shards.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_splits_with_other_classes_are_refused(cli: Cli, small: tuple[str, ...], copied: Path) -> None:
    edit_index(copied / "val", classes=["a", "b", "c", "d"])
    require_refused(cli("train", *small, *on(copied)), "data.val", "class 0 is", "'a'")
    assert not (cli.cwd / "runs").exists()


def test_a_tar_that_the_index_does_not_describe_is_refused(cli: Cli, small: tuple[str, ...], copied: Path) -> None:
    first, second, *_ = sorted((copied / "train").glob("*.tar"))
    with first.open("ab") as file:
        file.write(bytes(10240))
    second.unlink()
    require_refused(cli("train", *small, *on(copied)), "2 of", str(first), str(second), "stale", "orchestrator shards")
    assert not (cli.cwd / "runs").exists()


def test_a_label_out_of_range_is_refused_with_its_shard_and_member(
    cli: Cli, small: tuple[str, ...], copied: Path
) -> None:
    for split in ("train", "val"):
        body = json.loads((copied / split / "shards.json").read_text())
        edit_index(copied / split, classes=body["classes"][:3], class_counts=body["class_counts"][:3])
    answer = cli("train", *small, *on(copied))
    require_refused(answer, "label 3", "0..2", "member", ".tar", "model.num_classes")
    (folder,) = (cli.cwd / "runs").iterdir()
    assert json.loads((folder / "result.json").read_text())["state"] == "failed"
    assert not [*folder.glob("checkpoints/step_*")]


def test_an_unreadable_image_ends_the_run_or_is_left_out_and_counted(
    cli: Cli, small: tuple[str, ...], copied: Path
) -> None:
    path = sorted((copied / "val").glob("*.tar"))[0]
    blank_first_image(path)
    assert cli("shards", "index", path.parent).code == 0  # the image is bad, the shard is as its index says
    require_refused(cli("train", *small, *on(copied)), str(path), "member", "data.on_bad=skip")
    blank_first_image(sorted((copied / "train").glob("*.tar"))[0])
    assert cli("shards", "index", copied / "train").code == 0
    none = "data.bad_budget=0"
    require_refused(cli("train", *small, *on(copied), "data.on_bad=skip", none), "data.bad_budget = 0", "at most 0 of")
    skipping = cli("train", *small, *on(copied), "data.on_bad=skip", "--json")
    assert skipping.code == 0, skipping.err
    assert skipping.json()["metrics"]["val/acc1"]["count"] == 35
    folder = cli.cwd / "runs" / skipping.json()["run_id"]
    epochs = json.loads((folder / "run.json").read_text())["config"]["recipe"]["epochs"]
    events = [json.loads(line) for line in (folder / "events" / "rank_0.jsonl").read_text().splitlines()]
    assert sum(event.get("train/skipped", 0) for event in events) == epochs
    assert "1 unreadable images left out" in skipping.err


def blank_first_image(path: Path) -> None:
    content = path.read_bytes()
    at = content.index(b"\x89PNG") if b"\x89PNG" in content else content.index(b"\xff\xd8")
    path.write_bytes(content[:at] + bytes(32) + content[at + 32 :])


def test_a_diverging_optimizer_ends_the_run_with_the_step(cli: Cli, small: tuple[str, ...], saboteur: Saboteur) -> None:
    wild = ("model=timm", "model.name=saboteur", "optimizer.lr=1e30", "checkpointing.every_steps=1")
    answer = cli("train", *small, *wild, "tracking.log_every_steps=7")
    require_refused(answer, "recipe.on_nan = stop: training diverged: ", "optimizer.lr", "recipe.clip_norm")
    (folder,) = (cli.cwd / "runs").iterdir()
    saved = {int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*")}
    assert saved <= {1, 2, 3}


class TestCheckpoint:
    """A checkpoint that cannot be used, by `evaluate` and `predict` alike."""

    @pytest.fixture
    def folder(self, cli: Cli, trained: Run) -> Path:
        """The run's last checkpoint, to spoil."""
        shutil.copytree(trained.folder, cli.cwd / "runs" / trained.folder.name)
        return Path("runs", trained.folder.name, "checkpoints", "step_00000014")

    @pytest.fixture(params=["evaluate", "predict"])
    def command(self, request: Fixture, cli: Cli) -> list[str]:
        picture = cli.cwd / "picture.png"
        picture.write_bytes(png(8, 8))
        return [request.param, *([str(picture)] if request.param == "predict" else [])]

    def test_an_unknown_id_lists_the_runs_that_exist(self, cli: Cli, folder: Path, command: list[str]) -> None:
        before = files_below(cli.cwd)
        require_refused(cli(*command, "checkpoint=quikstart-1:best"), "checkpoint = quikstart-1", folder.parts[1])
        assert files_below(cli.cwd) == before

    def test_no_checkpoint_at_all(self, cli: Cli, folder: Path, command: list[str]) -> None:
        require_refused(cli(*command), "checkpoint", "must be given once")

    @pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "manifest.json"])
    def test_a_truncated_file_is_named(self, cli: Cli, folder: Path, command: list[str], name: str) -> None:
        os.truncate(cli.cwd / folder / name, 50)
        before = files_below(cli.cwd)
        require_refused(cli(*command, f"checkpoint={folder}"), f"{folder}/{name}")
        assert files_below(cli.cwd) == before

    def test_another_model_than_the_one_asked_for(self, cli: Cli, folder: Path, command: list[str]) -> None:
        before = files_below(cli.cwd)
        require_refused(
            cli(*command, f"checkpoint={folder}", "model=resnet18"),
            "model.name = resnet18", str(folder), "cifar_resnet20",
        )  # fmt: skip
        assert files_below(cli.cwd) == before

    def test_a_bare_weights_file_without_its_model(self, cli: Cli, folder: Path, command: list[str]) -> None:
        weights = folder / "model.safetensors"
        require_refused(cli(*command, f"checkpoint={weights}"), str(weights), "model=")

    def test_a_bare_weights_file_of_another_model(self, cli: Cli, folder: Path) -> None:
        typed = (
            "model=cifar_resnet32",
            "data=synthetic",
            "model.num_classes=4",
            f"checkpoint={folder}/model.safetensors",
        )
        (cli.cwd / "picture.png").write_bytes(png(8, 8))
        require_refused(cli("predict", *typed, "picture.png"), "model.safetensors")

    def test_shards_with_other_classes(self, cli: Cli, folder: Path, copied: Path) -> None:
        edit_index(copied / "val", classes=["a", "b", "c", "d"])
        answer = cli("evaluate", f"checkpoint={folder}", f"data.val={copied}/val")
        require_refused(answer, f"{copied}/val", "from class 0 on")


class TestResume:
    """A run folder whose checkpoint does not belong to what the same command would train now."""

    @pytest.fixture
    def stopped(self, cli: Cli, small: tuple[str, ...], copied: Path, saboteur: Saboteur) -> list[str]:
        """The command of a run that was stopped after two steps."""
        command = ["train", *small, *on(copied), "model=timm", "model.name=saboteur", "recipe.ema_decay=0.9"]
        saboteur.arm("SIGTERM", 0, 2)
        assert cli(*command).code == 143
        return command

    def test_other_shards_at_the_same_place(self, cli: Cli, stopped: list[str], copied: Path) -> None:
        shutil.rmtree(copied)
        packed = ("--samples", 144, "--classes", 4, "--size", 8, "--val-fraction", 0.25, "--workers", 1)
        assert cli("shards", "make", "synthetic", copied, *packed).code == 0
        (checkpoints,) = cli.cwd.glob("runs/*/checkpoints")
        before = files_below(checkpoints)
        require_refused(cli(*stopped), "step_00000002", "other shards", f"{copied}/train")
        assert files_below(checkpoints) == before

    def test_the_checkpoint_of_another_model(self, cli: Cli, stopped: list[str], trained: Run) -> None:
        (checkpoints,) = cli.cwd.glob("runs/*/checkpoints")
        shutil.copytree(trained.folder / "checkpoints" / "step_00000007", checkpoints / "step_00000007")
        before = files_below(checkpoints)
        require_refused(cli(*stopped), "step_00000007", "is not of this run", "model.name = saboteur")
        assert files_below(checkpoints) == before

    def test_a_torn_result_is_refused(self, cli: Cli, stopped: list[str]) -> None:
        (path,) = cli.cwd.glob("runs/*/result.json")
        os.truncate(path, 20)
        require_refused(cli(*stopped), "result.json", "cannot be read")


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size; its pixels are all there only where that is small."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    noise = Random(0)
    rows = b"".join(b"\0" + noise.randbytes(3 * width) for _ in range(height)) if width * height < 1000 else b""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


class TestPredict:
    """Images that cannot be predicted."""

    @pytest.fixture
    def command(self, trained: Run) -> list[str]:
        return ["predict", f"checkpoint={trained.folder}"]

    def test_all_paths_that_do_not_exist_are_named(self, cli: Cli, command: list[str]) -> None:
        require_refused(cli(*command, "a.png", "b.png"), "a.png", "b.png", "no such file")

    def test_an_empty_folder_is_refused(self, cli: Cli, command: list[str]) -> None:
        (cli.cwd / "empty").mkdir()
        require_refused(cli(*command, "empty"), "empty", "holds no image")

    def test_unreadable_images_are_all_listed_after_the_others_were_predicted(
        self, cli: Cli, command: list[str]
    ) -> None:
        folder = cli.cwd / "images"
        folder.mkdir()
        for name, content in {
            "good": png(8, 8), "zero": b"", "text": b"hello", "torn": png(16, 16)[:400], "bomb": png(60_000, 60_000)
        }.items():  # fmt: skip
            (folder / f"{name}.png").write_bytes(content)
        answer = cli(*command, "images", "--json")
        require_refused(answer, "4 of 5 images", *(f"images/{name}.png: " for name in ("zero", "text", "torn", "bomb")))
        assert "images/bomb.png: claims 60,000 x 60,000 pixels, at most 178,956,970" in answer.err
        assert {row["path"]: bool(row["guesses"]) for row in answer.json()} == {
            f"images/{name}.png": name == "good" for name in ("good", "zero", "text", "torn", "bomb")
        }

    def test_no_class_to_show_is_refused(self, cli: Cli, command: list[str]) -> None:
        (cli.cwd / "picture.png").write_bytes(png(8, 8))
        require_refused(cli(*command, "picture.png", "--top", 0), "--top = 0")


@pytest.fixture
def small_disk(cli: Cli) -> Iterator[Path]:
    """A file system of 5 MiB in the place of runs/: room for one checkpoint of 3.3 MiB."""
    place = cli.cwd / "runs"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_save_is_the_nodes_fault_and_the_run_goes_on_once_there_is_room(
    cli: Cli, small: tuple[str, ...], small_disk: Path, trained: Run
) -> None:
    typed = ("train", *small, "recipe.ema_decay=0.9", "--json")
    require_refused(cli(*typed), "runs/", "disk full", code=44)
    (folder,) = small_disk.iterdir()
    assert [path.name for path in folder.glob("checkpoints/step_*")] == ["step_00000007"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    answer = cli(*typed)
    assert answer.code == 0, answer.err
    assert "resuming at step 7 of 14" in answer.err
    assert answer.json()["state_sha256"] == trained.result["state_sha256"]


def test_a_damaged_shard_ends_the_run_with_its_place_or_is_quarantined_and_counted(
    cli: Cli, small: tuple[str, ...], copied: Path
) -> None:
    path = sorted((copied / "train").glob("*.tar"))[0]
    samples = json.loads((copied / "train" / "shards.json").read_text())["shardlist"][0]["nsamples"]
    flip_a_bit(path)
    require_refused(cli("train", *small, *on(copied)), str(path), "member", "offset", "data.on_damage=quarantine")
    quarantine = "data.on_damage=quarantine"
    require_refused(cli("train", *small, *on(copied), quarantine), "data.bad_budget = 0.01", "samples of this epoch")
    done = cli("train", *small, *on(copied), quarantine, "data.bad_budget=0.9", "--json")
    assert done.code == 0, done.err
    folder = cli.cwd / "runs" / done.json()["run_id"]
    events = [json.loads(line) for line in (folder / "events" / "rank_0.jsonl").read_text().splitlines()]
    lost = [event["data/samples_lost"] for event in events if event["kind"] == "data"]
    assert lost == [samples] * len(lost) != []
    assert "shards found damaged" in done.err
    assert "shards damaged" in (folder / "report.html").read_text()


def flip_a_bit(tar: Path) -> None:
    """In the middle of the first image."""
    with tarfile.open(tar) as archive:
        image = next(member for member in archive if not member.name.endswith(".cls"))
    with tar.open("r+b") as file:
        file.seek(image.offset_data + image.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes((byte ^ 1,)))
