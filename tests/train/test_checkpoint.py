"""A checkpoint is whole or refused by the name of its damaged file, and its hashes cover all that decides a run."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.compose import compose
from orchestrator.config import METRICS, CheckpointingConfig
from orchestrator.errors import CheckpointError, ConfigError, NodeError
from orchestrator.train import checkpoint, retention
from orchestrator.train.evaluate import Evaluation
from orchestrator.train.fence import Fence
from orchestrator.train.state import TrainState
from orchestrator.train.writing import write_checkpoint

FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt", "rank_0.pt", "manifest.json")


def make_state(size: int = 4) -> TrainState:
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(size, 3, generator=generator)
    optimizer = {
        "state": {0: {"momentum_buffer": torch.full((size, 3), 0.5), "step": torch.tensor(7.0)}},
        "param_groups": [{"lr": 0.1, "params": [0], "nesterov": True}],
    }
    model = {"w": weight, "count": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16)}
    return TrainState(model, {"n_averaged": torch.tensor(2), "module.w": weight / 2}, optimizer, {"scale": 65536.0})


def save(root: Path, step: int, acc1: float | None = None, state: TrainState | None = None) -> Path:
    metrics = {} if acc1 is None else {"val/acc1": {"hits": 1, "count": 2, "value": acc1}}
    fence = Fence(root, 1)
    try:
        manifest = {"step": step, "metrics": metrics, "world_size": 1}
        return write_checkpoint(fence, state or make_state(), [b"random states"], manifest)
    finally:
        fence.release()


@cache
def defaults() -> CheckpointingConfig:
    return compose([]).config.checkpointing


def prune(root: Path, keep_last: int, keep_best: int = 1, metric: str = "val/acc1") -> None:
    fence = Fence(root, 1)
    retention.prune(fence, replace(defaults(), keep_last=keep_last, keep_best=keep_best, metric=metric))
    fence.release()


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = make_state()
    folder = save(tmp_path, 12)
    assert folder == tmp_path / "step_00000012"
    found = checkpoint.open_checkpoint(folder)
    loaded = found.load_state()
    assert found.step == 12
    assert checkpoint.hash_state(loaded, 12) == checkpoint.hash_state(state, 12) == found.manifest["state_sha256"]
    assert loaded.optimizer["param_groups"] == state.optimizer["param_groups"]
    assert loaded.scaler == state.scaler
    assert all(torch.equal(loaded.model[name], state.model[name]) for name in state.model)
    assert loaded.model["half"].dtype is torch.bfloat16
    assert state.ema is not None
    assert torch.equal(found.load_weights()["w"], state.ema["module.w"])


def test_without_a_moving_average_evaluation_takes_the_model(tmp_path: Path) -> None:
    state = make_state()
    state.ema = None
    found = checkpoint.open_checkpoint(save(tmp_path, 1, state=state))
    assert found.load_state().ema is None
    assert torch.equal(found.load_weights()["w"], state.model["w"])


def test_the_manifest_lists_size_and_sha256_of_every_other_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert names(folder) == sorted(FILES)
    assert manifest["files"] == {
        name: {
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            "bytes": (folder / name).stat().st_size,
        }
        for name in FILES
        if name != "manifest.json"
    }
    assert manifest["schema"] == 1
    assert json.loads((tmp_path / "latest.json").read_text()) == {"schema": 1, "step": 3, "folder": folder.name}


def test_weights_sha256_is_over_name_dtype_shape_and_bytes_in_the_order_of_names(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(f"{name}\0{str(tensor.dtype)[6:]}\0{tuple(tensor.shape)}\0".encode())
        digest.update(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
    assert checkpoint.open_checkpoint(folder).manifest["weights_sha256"] == digest.hexdigest()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_to_any_file_is_refused_by_its_name(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, 3) / name
    content = bytearray(path.read_bytes())
    match damage:
        case "truncated":
            path.write_bytes(content[:-1] if name != "manifest.json" else content[: len(content) // 2])
        case "flipped":
            content[len(content) // 2 if name != "manifest.json" else 0] ^= 1
            path.write_bytes(content)
        case "missing":
            path.unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open_checkpoint(path.parent)
    assert str(path) in str(caught.value)
    assert "Way out:" in str(caught.value)


def test_a_folder_that_does_not_exist_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.open_checkpoint(tmp_path / "step_00000001")


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 3) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))
    with pytest.raises(CheckpointError, match="schema 2"):
        checkpoint.open_checkpoint(path.parent)


def test_the_newest_whole_checkpoint_is_found_and_damaged_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    os.truncate(tmp_path / "step_00000100" / "optimizer.pt", 5)
    (tmp_path / "step_00000010" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 9
    assert [str(path) in caplog.text for path in sorted(tmp_path.glob("step_*"))] == [False, True, True]
    assert "optimizer.pt" in caplog.text


def test_a_run_without_a_whole_checkpoint_has_no_newest_and_no_best(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert retention.best(tmp_path) is None


@pytest.mark.parametrize(
    ("scores", "best"),
    [({1: 0.5, 2: 0.9, 3: 0.7}, 2), ({1: 0.5, 2: 0.5}, 2), ({1: None, 2: 0.1, 3: None}, 2), ({1: 0.0}, 1)],
    ids=["middle", "newest-of-equals", "unscored-ones-never", "zero"],
)
def test_the_best_has_the_greatest_accuracy(tmp_path: Path, scores: dict[int, float | None], best: int) -> None:
    for step, score in scores.items():
        save(tmp_path, step, score)
    found = retention.best(tmp_path)
    assert found is not None
    assert found.step == best


def test_pruning_keeps_the_newest_and_the_best_through_a_whole_run(tmp_path: Path) -> None:
    scores = [0.1, 0.8, 0.3, 0.2, 0.9, 0.4, 0.4, 0.4]
    for step, score in enumerate(scores, start=1):
        save(tmp_path, step, score)
        prune(tmp_path, keep_last=2)
        best = max(range(1, step + 1), key=lambda s: (scores[s - 1], s))
        kept = {best, step, max(1, step - 1)}
        assert {int(path.name[5:]) for path in tmp_path.glob("step_*")} == kept
    assert names(tmp_path) == ["latest.json", "step_00000005", "step_00000007", "step_00000008"]


@pytest.mark.parametrize(
    ("metric", "keep_best", "kept"),
    [("val/acc1", 2, {2, 5, 8}), ("val/acc1", 0, {8}), ("val/loss", 1, {4, 8}), ("val/loss", 3, {1, 4, 6, 8})],
)
def test_the_best_by_a_figure_stay_and_a_loss_is_better_when_it_is_smaller(
    tmp_path: Path, metric: str, keep_best: int, kept: set[int]
) -> None:
    accuracies, losses = [0.1, 0.8, 0.3, 0.2, 0.9, 0.4, 0.4, 0.4], [0.2, 0.9, 0.8, 0.1, 0.7, 0.3, 0.5, 0.6]
    for step, (acc1, loss) in enumerate(zip(accuracies, losses, strict=True), start=1):
        fence = Fence(tmp_path, 1)
        metrics = {"val/acc1": {"hits": 1, "count": 2, "value": acc1}, "val/loss": loss}
        manifest = {"step": step, "metrics": metrics, "world_size": 1, "best_by": metric}
        write_checkpoint(fence, make_state(), [b""], manifest)
        fence.release()
        prune(tmp_path, 1, keep_best, metric)
    assert {int(path.name[5:]) for path in tmp_path.glob("step_*")} == kept
    found = retention.best(tmp_path)
    assert found is not None
    assert found.step == {"val/acc1": 5 if keep_best else 8, "val/loss": 4}[metric]


def test_the_config_knows_every_figure_of_an_evaluation() -> None:
    judged = Evaluation(1, 2, 3, 0, 0.5, torch.eye(3, dtype=torch.int64), [], [])
    assert tuple(judged.metrics()) == METRICS


@pytest.mark.parametrize("metric", ["val/acc2", "acc1", "train/loss", ""])
def test_a_figure_that_no_evaluation_gives_is_refused_with_those_that_it_does(metric: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpointing.metric = .*is no figure of an evaluation. Way out: "):
        compose([f"checkpointing.metric='{metric}'"])


def test_damaged_later_checkpoints_step_aside_and_do_not_count_as_newest(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, 0.5)
    checkpoint.set_aside(tmp_path, after=2)
    assert names(tmp_path) == ["damaged_step_00000004", "damaged_step_00000006", "latest.json", "step_00000002"]
    save(tmp_path, 3)
    prune(tmp_path, keep_last=1)
    assert checkpoint.newest(tmp_path).step == 3  # pyright: ignore[reportOptionalMemberAccess]
    save(tmp_path, 4)
    checkpoint.set_aside(tmp_path, after=3)  # a second time, over the first one's folder
    assert "damaged_step_00000004" in names(tmp_path)


def test_pruning_passes_over_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, 1 / step)
    (tmp_path / "step_00000001" / "manifest.json").unlink()
    prune(tmp_path, keep_last=1)
    assert names(tmp_path) == ["latest.json", "step_00000002", "step_00000003"]


def test_leftovers_of_a_killed_save_or_prune_are_removed_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = Fence(tmp_path, 1).make("step_00000002")
    (half / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path).step == 1  # pyright: ignore[reportOptionalMemberAccess]
    save(tmp_path, 3)
    assert names(tmp_path) == ["latest.json", "step_00000001", "step_00000003"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    other = make_state()
    other.model["w"] += 1
    folder = save(tmp_path, 1, state=other)
    assert checkpoint.open_checkpoint(folder).manifest["weights_sha256"] == checkpoint.hash_tensors(other.model)


def _changes() -> dict[str, Callable[[TrainState], Any]]:
    def change(kind: str, name: str) -> Callable[[TrainState], Any]:
        return lambda state: getattr(state, kind).__setitem__(name, getattr(state, kind)[name] + 1)

    return {
        "a weight": lambda state: state.model["w"].view(-1)[5].add_(1e-6),
        "a counter": change("model", "count"),
        "a dtype": lambda state: state.model.__setitem__("half", state.model["half"].half()),
        "a shape": lambda state: state.model.__setitem__("w", state.model["w"].view(3, -1)),
        "a name": lambda state: state.model.__setitem__("v", state.model.pop("w")),
        "the average": change("ema", "module.w"),
        "the average's count": change("ema", "n_averaged"),
        "a momentum": lambda state: state.optimizer["state"][0]["momentum_buffer"].view(-1)[0].add_(1e-6),
        "the optimizer's step": lambda state: state.optimizer["state"][0]["step"].add_(1),
        "a rate": lambda state: state.optimizer["param_groups"][0].__setitem__("lr", 0.1 + 1e-12),
        "an option": lambda state: state.optimizer["param_groups"][0].__setitem__("nesterov", False),
        "the loss scale": change("scaler", "scale"),
    }


@pytest.mark.parametrize("what", _changes())
def test_the_state_hash_changes_with(what: str) -> None:
    state = make_state()
    before = checkpoint.hash_state(copy.deepcopy(state), 5)
    assert checkpoint.hash_state(state, 5) == before
    _changes()[what](state)
    assert checkpoint.hash_state(state, 5) != before


def test_the_state_hash_changes_with_the_step_and_not_with_the_order_of_names() -> None:
    state, turned = make_state(), make_state()
    turned.model = dict(reversed(turned.model.items()))
    turned.optimizer = dict(reversed(turned.optimizer.items()))
    assert checkpoint.hash_state(state, 5) == checkpoint.hash_state(turned, 5)
    assert checkpoint.hash_state(state, 5) != checkpoint.hash_state(state, 6)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_the_nodes_fault_and_leaves_the_previous_checkpoint_whole(small_disk: Path) -> None:
    save(small_disk, 1)
    with pytest.raises(NodeError, match="disk full") as caught:
        save(small_disk, 2, state=make_state(100_000))
    assert caught.value.exit_code == 44
    assert str(small_disk) in str(caught.value)
    assert checkpoint.newest(small_disk).step == 1  # pyright: ignore[reportOptionalMemberAccess]
    save(small_disk, 2)
    assert names(small_disk) == ["latest.json", "step_00000001", "step_00000002"]
