"""Kills from outside, one after the other, in one run that starts again by itself: it ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from harness import Bench, Story, require_each_sample_once

from orchestrator.files import read_json
from orchestrator.track.goodput import measure_run
from orchestrator.track.runs import load_run
from orchestrator.train.heartbeat import Sign, read_sign

KILLS = int(os.environ.get("ORCHESTRATOR_SOAK_KILLS", "200"))
STEPS_BETWEEN = 5
"""Mean number of steps that an attempt may make; a fifth of the kills do not wait for a step at all."""
LONG = (f"recipe.epochs={2 + KILLS // 8}", "cluster.max_restarts=100000", "checkpointing.every_steps=4")
pytestmark = [pytest.mark.timeout(3600), pytest.mark.slow]


class Killer(threading.Thread):
    """Kills one rank of each attempt at a moment drawn from a seed, until it has killed often enough."""

    def __init__(self, folder: Path, kills: int, seed: int):
        super().__init__(daemon=True)
        self._folder, self._draw, self._left = folder, random.Random(seed), kills
        self.struck: list[dict[str, Any]] = []
        self.ended = threading.Event()

    def run(self) -> None:
        attempt = 0
        while len(self.struck) < self._left and not self.ended.is_set():
            attempt = self._next(attempt)
            self._kill(attempt)

    def _next(self, attempt: int) -> int:
        while not self.ended.is_set() and not self._signs(attempt + 1):
            time.sleep(0.002)
        return attempt + 1

    def _kill(self, attempt: int) -> None:
        rank, early = self._draw.randrange(2), self._draw.random() < 0.2
        wait_s, steps = self._draw.uniform(0, 0.5), round(self._draw.expovariate(1 / STEPS_BETWEEN))
        began, first = time.monotonic(), None
        while not self.ended.is_set():
            sign = self._signs(attempt).get(rank)
            first = sign.step if sign and sign.phase != "start" and first is None else first
            due = time.monotonic() - began > wait_s if early else first is not None
            if sign and due and (early or sign.step >= (first or 0) + steps):
                os.kill(sign.pid, signal.SIGKILL)
                self.struck.append({"attempt": attempt, "rank": rank, "phase": sign.phase, "step": sign.step})
                return
            time.sleep(0.002)

    def _signs(self, attempt: int) -> dict[int, Sign]:
        paths = self._folder.glob(f"runs/*/logs/attempt_{attempt}/rank_*.heartbeat")
        signs = {int(path.stem.removeprefix("rank_")): read_sign(path) for path in paths}
        return {rank: sign for rank, sign in signs.items() if sign is not None}


def soak(bench: Bench, kills: int, seed: int) -> tuple[Story, list[dict[str, Any]]]:
    folder = bench.root / "soak"
    killer = Killer(folder, kills, seed)
    killer.start()
    story = bench.run("soak", more=LONG)
    killer.ended.set()
    killer.join()
    return story, killer.struck


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(bench: Bench) -> None:
    left_alone = bench.run("long", more=LONG)
    story, struck = soak(bench, KILLS, seed=0)
    tell(story, struck, left_alone)
    assert len(struck) == KILLS
    assert story.codes == (0,), story.told()
    assert story.attempts() == KILLS + 1
    assert story.differences(left_alone) == []
    require_each_sample_once(story, bench.steps_per_epoch, bench.num_samples)
    assert story.leftovers == ()
    came = measure_run(load_run(story.run_folder))
    assert sum(came.seconds.values()) == pytest.approx(came.wall_s, rel=0.01)


def tell(story: Story, struck: list[dict[str, Any]], left_alone: Story) -> None:
    """The figures of the soak, for a reader of the test's output."""
    came, alone = (measure_run(load_run(one.run_folder)) for one in (story, left_alone))
    phases = sorted({strike["phase"] for strike in struck})
    counts = {phase: sum(strike["phase"] == phase for strike in struck) for phase in phases}
    steps = read_json(story.run_folder / "result.json")["step"]
    facts = {
        "kills": len(struck), "in phase": counts, "steps": steps, "wall_s": came.wall_s, "goodput": came.value,
        "sum of phases / wall": sum(came.seconds.values()) / came.wall_s, "seconds": came.seconds,
        "undisturbed": {"wall_s": alone.wall_s, "goodput": alone.value},
    }  # fmt: skip
    print(json.dumps(facts, indent=1))
