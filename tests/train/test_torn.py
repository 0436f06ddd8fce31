"""Whatever happens to a checkpoint or its writer, the next attempt goes on from a whole one and says what it passed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import wait_for
from test_checkpoint import make_state, save, small_disk  # noqa: F401

from orchestrator.errors import CheckpointError, NodeError
from orchestrator.train import checkpoint, writing
from orchestrator.train.checkpoint import hash_manifest, hash_state, newest, open_checkpoint
from orchestrator.train.fence import Fence
from orchestrator.train.writing import write_checkpoint

FORK = multiprocessing.get_context("fork")
PIECE_S = 0.003
pytestmark = pytest.mark.timeout(200)


def slow_writes(place: Path) -> None:
    """Each piece takes a while; what is being written is told in `place`."""
    write = writing.Sums.write

    def slow(self: writing.Sums, content: Any) -> int:
        place.write_text(str(Path(self._file.name)))
        time.sleep(PIECE_S)
        return write(self, content)

    writing.Sums.write = slow


def save_for_ever(root: Path, attempt: int, first: int, place: Path) -> None:
    slow_writes(place)
    fence = Fence(root, attempt)
    for step in range(first, first + 1000):
        write_checkpoint(fence, make_state(step), [b"random states"], {"step": step, "metrics": {}, "world_size": 1})
        place.write_text(f"sealed {step}")
        time.sleep(PIECE_S / 3)


def require_whole(root: Path) -> int:
    """The step of the newest checkpoint, whose bits are those of its step."""
    found = newest(root)
    assert found is not None
    assert hash_state(found.load_state(), found.step) == hash_state(make_state(found.step), found.step)
    return found.step


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_writer_that_is_killed_at_any_moment_leaves_whole_checkpoints_only(
    tmp_path: Path, kills: int, caplog: pytest.LogCaptureFixture
) -> None:
    root, place, rng, inside = tmp_path / "checkpoints", tmp_path / "place", random.Random(8), 0
    save(root, 1, None, make_state(1))
    last = 1
    for attempt in range(2, kills + 2):
        place.unlink(missing_ok=True)
        child = FORK.Process(target=save_for_ever, args=(root, attempt, last + 1, place))
        child.start()
        wait_for(place.exists, "the first byte")
        time.sleep(rng.random() * 0.15)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        inside += not place.read_text().startswith("sealed")
        step = require_whole(root)
        assert step >= last
        assert {path.name for path in root.iterdir()} - {f"step_{step:08d}" for step in range(1, step + 1)} <= {
            "latest.json", *(path.name for path in root.glob(".attempt_*"))
        }  # fmt: skip
        last = step
    assert inside > kills * 0.6  # most of the kills came amid a save
    assert "damaged" not in caplog.text
    Fence(root, kills + 2).release()
    assert list(root.glob(".*")) == []


def three(root: Path) -> Path:
    for step in (1, 2, 3):
        save(root, step, 0.5, make_state(step))
    return root / "step_00000003"


@pytest.mark.parametrize("seed", range(20))
def test_a_checkpoint_cut_anywhere_is_passed_over_by_name(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng, folder = random.Random(seed), three(tmp_path)
    victim = rng.choice(sorted(folder.iterdir()))
    os.truncate(victim, rng.randrange(victim.stat().st_size))
    with caplog.at_level(logging.WARNING):
        assert require_whole(tmp_path) == 2
    assert str(victim) in caplog.text


@pytest.mark.parametrize("seed", range(20))
def test_a_checkpoint_with_one_other_bit_is_passed_over_by_name(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng, folder = random.Random(seed), three(tmp_path)
    victim = folder / "manifest.json" if seed < 8 else rng.choice(sorted(folder.iterdir()))
    content = bytearray(victim.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    victim.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert require_whole(tmp_path) == 2
    assert str(folder) in caplog.text


@pytest.mark.parametrize(
    ("pointer", "told"),
    [
        (b"", "cannot be read"),
        (b'{"schema": 1, "st', "cannot be read"),
        (b"[]", "cannot be read"),
        (b'{"schema": 1, "step": 9, "folder": "step_00000009"}', "names 'step_00000009'"),
        (b'{"schema": 1, "step": 1, "folder": "step_00000001"}', "names 'step_00000001'"),
    ],
)
def test_a_pointer_that_is_torn_or_lies_costs_a_warning(
    tmp_path: Path, pointer: bytes, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    three(tmp_path)
    (tmp_path / "latest.json").write_bytes(pointer)
    with caplog.at_level(logging.WARNING):
        assert require_whole(tmp_path) == 3
    assert told in caplog.text
    assert "step_00000003 is the newest whole checkpoint" in caplog.text


def forge(folder: Path, **changes: Any) -> None:
    """Change a manifest and give it the hash that belongs to it, as an attacker would."""
    path = folder / "manifest.json"
    content = {**json.loads(path.read_text()), **changes}
    content = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps({**content, "manifest_sha256": hash_manifest(content)}))


def replace_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    facts = {"sha256": checkpoint.hash_file(folder / name), "bytes": len(content)}
    forge(folder, files={**json.loads((folder / "manifest.json").read_text())["files"], name: facts})


@pytest.mark.parametrize("field", ["step", "metrics", "weights_sha256", "state_sha256", "files"])
def test_a_manifest_that_lacks_a_field_is_refused_by_the_name_of_the_field(tmp_path: Path, field: str) -> None:
    folder = three(tmp_path)
    forge(folder, **{field: None})
    with pytest.raises(CheckpointError, match=f"manifest.json lacks {field}"):
        open_checkpoint(folder)


def test_what_the_reader_needs_besides_is_asked_for_by_name(tmp_path: Path) -> None:
    folder = three(tmp_path)
    with pytest.raises(CheckpointError, match=r"manifest.json lacks data_digest, lost\."):
        open_checkpoint(folder, ["step", "data_digest", "lost"])
    assert newest(tmp_path, ["data_digest"]) is None


def test_a_rank_whose_state_is_not_listed_is_missed(tmp_path: Path) -> None:
    folder = three(tmp_path)
    forge(folder, world_size=3)
    with pytest.raises(CheckpointError, match=r"does not list rank_1\.pt, rank_2\.pt"):
        open_checkpoint(folder)


def test_a_folder_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    os.rename(three(tmp_path), tmp_path / "step_00000007")
    with pytest.raises(CheckpointError, match="is of step 3"):
        open_checkpoint(tmp_path / "step_00000007")


class Canary:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _pickled(folder: Path, canary: Path) -> None:
    torch.save({"optimizer": Canary(canary), "scaler": {}}, folder / "forged")
    replace_file(folder, "optimizer.pt", (folder / "forged").read_bytes())
    (folder / "forged").unlink()


def _bare_pickle(folder: Path, canary: Path) -> None:
    replace_file(folder, "optimizer.pt", pickle.dumps({"optimizer": Canary(canary), "scaler": {}}))


def _pickled_model(folder: Path, canary: Path) -> None:
    replace_file(folder, "model.safetensors", pickle.dumps(Canary(canary)))


def _bomb(folder: Path, canary: Path) -> None:
    with zipfile.ZipFile(folder / "forged", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    replace_file(folder, "optimizer.pt", (folder / "forged").read_bytes())
    (folder / "forged").unlink()


def _header_bomb(folder: Path, canary: Path) -> None:
    replace_file(folder, "model.safetensors", (1 << 60).to_bytes(8, "little") + b"{}")


def _linked(folder: Path, canary: Path) -> None:
    outside = folder.parent / "outside"
    shutil.move(folder / "optimizer.pt", outside)
    (folder / "optimizer.pt").symlink_to(outside)


def _named(name: str) -> Callable[[Path, Path], None]:
    def change(folder: Path, canary: Path) -> None:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        forge(folder, files={**files, name: files["optimizer.pt"]})

    return change


def _other_content(folder: Path, canary: Path) -> None:
    torch.save([1, 2], folder / "forged")
    replace_file(folder, "optimizer.pt", (folder / "forged").read_bytes())
    (folder / "forged").unlink()


@pytest.mark.parametrize(
    ("attack", "told"),
    [
        (_pickled, "more than tensors and plain values"),
        (_bare_pickle, "more than tensors and plain values"),
        (_pickled_model, "holds no tensors"),
        (_bomb, "would grow when it is unpacked"),
        (_header_bomb, "holds no tensors"),
        (_linked, "is a link"),
        (_named("../optimizer.pt"), "no file of its own folder"),
        (_named("/etc/passwd"), "no file of its own folder"),
        (_named(".."), "no file of its own folder"),
        (_other_content, "holds no optimizer and scaler"),
    ],
)
def test_a_forged_checkpoint_is_refused_and_runs_nothing(
    tmp_path: Path, attack: Callable[[Path, Path], None], told: str
) -> None:
    folder, canary = three(tmp_path), tmp_path / "canary"
    attack(folder, canary)
    with pytest.raises(CheckpointError, match=told) as caught:
        open_checkpoint(folder).load_state()
    assert "Way out" in str(caught.value)
    assert not canary.exists()


def test_a_disk_that_became_read_only_is_the_nodes_fault_and_what_is_there_is_used(small_disk: Path) -> None:  # noqa: F811
    fence = Fence(small_disk, 1)
    write_checkpoint(fence, make_state(1), [b""], {"step": 1, "metrics": {}, "world_size": 1})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(NodeError, match="cannot be written any more") as caught:
        write_checkpoint(fence, make_state(2), [b""], {"step": 2, "metrics": {}, "world_size": 1})
    assert caught.value.exit_code == 44
    assert require_whole(small_disk) == 1


def stop_amid_a_save(root: Path, told: Any) -> None:
    """An older attempt: its second save stops itself after the first bytes, and goes on when it is continued."""
    fence, write = Fence(root, 1), writing.Sums.write
    write_checkpoint(fence, make_state(1), [b""], {"step": 1, "metrics": {}, "world_size": 1})

    def stopping(self: writing.Sums, content: Any) -> int:
        writing.Sums.write = write
        os.kill(os.getpid(), signal.SIGSTOP)
        return write(self, content)

    writing.Sums.write = stopping
    for step in (2, 3):
        try:
            write_checkpoint(fence, make_state(9), [b""], {"step": step, "metrics": {}, "world_size": 1})
            told.put("saved")
        except CheckpointError as error:
            told.put(str(error))


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_an_older_attempt_that_was_stopped_amid_a_save_changes_nothing_when_it_wakes(tmp_path: Path) -> None:
    told = FORK.Queue()
    old = FORK.Process(target=stop_amid_a_save, args=(tmp_path, told))
    old.start()
    wait_for(lambda: state_of(old.pid or 0) == "T", "the older attempt's stop")
    fence = Fence(tmp_path, 2)
    for step in (2, 3):
        write_checkpoint(fence, make_state(step), [b""], {"step": step, "metrics": {}, "world_size": 1})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    os.kill(old.pid or 0, signal.SIGCONT)
    answers = [told.get(timeout=30) for _ in range(2)]
    old.join()
    assert all("a newer attempt saves to" in answer for answer in answers)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert require_whole(tmp_path) == 3
    write_checkpoint(fence, make_state(4), [b""], {"step": 4, "metrics": {}, "world_size": 1})
    assert require_whole(tmp_path) == 4
    fence.release()


def test_an_older_attempt_that_comes_late_is_refused(tmp_path: Path) -> None:
    fence = Fence(tmp_path, 3)
    with pytest.raises(CheckpointError, match="belongs to attempt 3 of this run, and this is attempt 2"):
        Fence(tmp_path, 2)
    write_checkpoint(fence, make_state(1), [b""], {"step": 1, "metrics": {}, "world_size": 1})
    fence.release()
    assert [path.name for path in tmp_path.glob(".*")] == []
