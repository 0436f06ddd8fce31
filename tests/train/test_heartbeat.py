"""A rank's signs of life as another process reads them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from launching import Run, read_events

from orchestrator.train.heartbeat import PHASES, Heartbeat, heartbeat_file, read_sign


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return heartbeat_file(tmp_path, 2, 1)


def test_a_sign_names_the_process_the_phase_the_step_and_when(path: Path) -> None:
    heartbeat = Heartbeat(path)
    for phase in PHASES:
        before = time.monotonic()
        heartbeat.enter(phase, 7)
        sign = read_sign(path)
        assert sign is not None
        assert (sign.pid, sign.phase, sign.step) == (os.getpid(), phase, 7)
        assert before <= sign.t <= time.monotonic()


def test_a_beat_moves_step_time_and_count_and_keeps_the_phase(path: Path) -> None:
    heartbeat = Heartbeat(path)
    heartbeat.enter("validation", 3)
    first = read_sign(path)
    heartbeat.beat(4)
    second = read_sign(path)
    assert first is not None
    assert second is not None
    assert (second.phase, second.step, second.beats) == ("validation", 4, first.beats + 1)
    assert second.t >= first.t


def test_items_that_are_followed_come_out_unchanged_with_a_beat_each(path: Path) -> None:
    heartbeat = Heartbeat(path)
    counts = []
    for item in heartbeat.following("abc"):
        sign = read_sign(path)
        assert sign is not None
        counts.append((item, sign.beats))
    assert [item for item, _ in counts] == ["a", "b", "c"]
    assert [count for _, count in counts] == list(range(counts[0][1], counts[0][1] + 3))


@pytest.mark.parametrize("content", [None, b"", b"half", bytes(32)])
def test_no_sign_is_read_before_there_is_one(path: Path, content: bytes | None) -> None:
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    assert read_sign(path) is None


def test_each_rank_of_a_run_leaves_its_last_sign_in_the_phase_end(trained: Run) -> None:
    for rank in (0, 1):
        sign = read_sign(heartbeat_file(trained.folder, 1, rank))
        assert sign is not None
        assert (sign.phase, sign.step) == ("end", trained.result["step"])
        assert sign.beats > len(read_events(trained.folder, rank))


def test_a_beat_costs_microseconds(path: Path) -> None:
    heartbeat = Heartbeat(path)
    began = time.perf_counter()
    for step in range(1000):
        heartbeat.beat(step)
    assert time.perf_counter() - began < 0.05
