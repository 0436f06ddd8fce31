"""Saving beside training: the bits of the step, the memory of one copy, and no error that gets lost."""

from __future__ import annotations

import copy
import io
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Cli, read_events
from test_checkpoint import make_state, small_disk  # noqa: F401

from orchestrator.compose import compose
from orchestrator.errors import NodeError
from orchestrator.train import writing
from orchestrator.train.checkpoint import hash_state, open_checkpoint
from orchestrator.train.fence import Fence
from orchestrator.train.heartbeat import Heartbeat
from orchestrator.train.process import Rank
from orchestrator.train.saver import Saved, Saver, Snapshot
from orchestrator.train.state import TrainState
from orchestrator.world import ALONE

RANK = Rank(ALONE, torch.device("cpu"), 1, io.StringIO(), None, Heartbeat())


@pytest.fixture
def make_saver() -> Iterator[Callable[..., Saver]]:
    savers: list[Saver] = []

    def make(root: Path, **settings: Any) -> Saver:
        config = replace(compose([]).config.checkpointing, **settings)
        savers.append(Saver(config, RANK, Fence(root, 1)))
        return savers[-1]

    yield make
    for saver in savers:
        saver.close()


def save(saver: Saver, state: TrainState, step: int, told: Callable[[Saved], None] = lambda saved: None) -> None:
    saver.save(state, {"step": step, "metrics": {}, "world_size": 1}, told)


def tensors(state: TrainState) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(key: str, tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    state.map(note)
    return found


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The writer waits for it before its first byte."""
    opened, write = threading.Event(), writing.Sums.write

    def waiting(self: writing.Sums, content: Any) -> int:
        assert opened.wait(30)
        return write(self, content)

    monkeypatch.setattr(writing.Sums, "write", waiting)
    yield opened
    opened.set()


def test_a_checkpoint_holds_the_bits_of_its_step_whatever_the_next_steps_do(
    tmp_path: Path, make_saver: Callable[..., Saver], gate: threading.Event
) -> None:
    state = make_state(50)
    before = hash_state(state, 3)
    saver = make_saver(tmp_path, asynchronous=True)
    save(saver, state, 3)
    for tensor in tensors(state):
        tensor.add_(1)  # as the optimizer does, in place
    gate.set()
    saver.settle()
    assert open_checkpoint(tmp_path / "step_00000003").manifest["state_sha256"] == before != hash_state(state, 3)


def test_files_are_the_same_byte_for_byte_whether_written_beside_or_at_once(
    tmp_path: Path, make_saver: Callable[..., Saver]
) -> None:
    state = make_state(50)
    state.model["wide"] = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    for name in ("beside", "at_once"):
        saver = make_saver(tmp_path / name, asynchronous=name == "beside")
        torch.manual_seed(0)
        save(saver, state, 3)
        saver.settle()
    one, two = (tmp_path / name / "step_00000003" for name in ("beside", "at_once"))
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_tensors_are_written_as_the_safetensors_library_writes_them(tmp_path: Path) -> None:
    from safetensors.torch import save as reference

    state = make_state(7).model | {"a": torch.zeros(0, 3), "b": torch.arange(3), "c": torch.tensor([True, False, True])}
    file = writing.Sums(tmp_path / "x")
    writing.write_safetensors(file, state)
    told = file.finish()
    file.close()
    assert (tmp_path / "x").read_bytes() == reference({name: value.contiguous() for name, value in state.items()})
    assert told["bytes"] == (tmp_path / "x").stat().st_size


def test_snapshots_use_the_same_memory_again() -> None:
    state, snapshot = make_state(1000), Snapshot()
    first = [tensor.data_ptr() for tensor in tensors(snapshot.take(state))]
    for _ in range(5):
        assert [tensor.data_ptr() for tensor in tensors(snapshot.take(state))] == first
    assert set(first).isdisjoint(tensor.data_ptr() for tensor in tensors(state))
    assert len(set(first)) == len(first)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_memory_does_not_grow_from_save_to_save(tmp_path: Path, make_saver: Callable[..., Saver]) -> None:
    state = TrainState({"w": torch.randn(2_000_000)}, None, {"m": torch.randn(2_000_000)}, {})
    saver = make_saver(tmp_path, asynchronous=True, keep_last=1)
    sizes = []
    for step in range(1, 13):
        save(saver, state, step)
        saver.settle()
        sizes.append(resident_mib())
    assert sizes[-1] - sizes[2] < 12  # one state is 15 MiB


def test_the_next_save_waits_for_the_one_under_way_and_both_are_told(
    tmp_path: Path, make_saver: Callable[..., Saver], gate: threading.Event
) -> None:
    saver, told = make_saver(tmp_path, asynchronous=True), []
    save(saver, make_state(), 1, lambda saved: told.append(saved.step))
    assert told == []
    assert list(tmp_path.glob("step_*")) == []
    threading.Timer(0.1, gate.set).start()
    save(saver, make_state(), 2, lambda saved: told.append(saved.step))
    assert told[:1] == [1]
    saver.wait(1)
    assert told == [1, 2]


def test_what_the_writer_met_is_raised_at_the_next_border_once(
    small_disk: Path,  # noqa: F811
    make_saver: Callable[..., Saver],
) -> None:
    saver = make_saver(small_disk, asynchronous=True)
    save(saver, make_state(), 1)
    saver.wait(1)
    save(saver, make_state(100_000), 2)
    with pytest.raises(NodeError, match="disk full") as caught:
        saver.wait(1)
    assert caught.value.exit_code == 44
    saver.check()
    save(saver, make_state(), 3)
    saver.wait(1)
    assert sorted(path.name for path in small_disk.glob("step_*")) == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize(
    "go_on",
    [Saver.check, lambda saver: save(saver, make_state(), 2), lambda saver: saver.wait(1)],
    ids=["border", "next save", "end"],
)
def test_no_way_leads_past_an_error(
    tmp_path: Path,
    make_saver: Callable[..., Saver],
    monkeypatch: pytest.MonkeyPatch,
    go_on: Callable[[Saver], None],
) -> None:
    saver = make_saver(tmp_path, asynchronous=True)
    monkeypatch.setattr(writing.Sums, "finish", lambda self: 1 / 0)
    save(saver, make_state(), 1)
    saver.settle()
    with pytest.raises(ZeroDivisionError):
        go_on(saver)


def test_an_error_that_nobody_asked_for_is_told_at_the_close(
    tmp_path: Path, make_saver: Callable[..., Saver], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = make_saver(tmp_path, asynchronous=True)
    monkeypatch.setattr(writing.Sums, "finish", lambda self: 1 / 0)
    save(saver, make_state(), 1)
    with caplog.at_level(logging.WARNING):
        saver.close()
    assert "the last save failed: division by zero" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_an_end_waits_for_the_last_save_and_leaves_nothing_else(
    tmp_path: Path, make_saver: Callable[..., Saver]
) -> None:
    saver = make_saver(tmp_path, asynchronous=True)
    save(saver, copy.deepcopy(make_state()), 9)
    saver.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step_00000009"]


def test_a_run_saves_by_the_clock_and_every_save_gets_durable(cli: Cli, small: tuple[str, ...]) -> None:
    often = ("checkpointing.every_s=0.0001", "checkpointing.every_epochs=0", "checkpointing.keep_last=3")
    answer = cli("train", *small, *often, "recipe.epochs=1", "--json")
    assert answer.code == 0, answer.err
    folder = cli.cwd / "runs" / answer.json()["run_id"]
    events = read_events(folder)
    for kind in ("save", "saved"):
        assert [event["step"] for event in events if event["kind"] == kind] == list(range(1, 8)), kind
    assert [event for event in read_events(folder, 1) if event["kind"] == "saved"] == []
    assert len(list((folder / "checkpoints").glob("step_*"))) == 3
    assert not list((folder / "checkpoints").glob(".*"))
