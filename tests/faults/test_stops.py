"""A request to stop reaches every rank from anywhere: all save at the same step, and nothing is computed twice."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from harness import Bench, Story, start_cold, until
from launching import finish, read_events

from orchestrator.train.heartbeat import Sign, read_sign

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]
LAUNCHER = "launcher"


class ColdRun:
    """The command as a process of its own."""

    def __init__(self, bench: Bench, name: str, more: tuple[str, ...] = ()):
        self.bench, self.folder, self.more = bench, bench.root / name, more
        self.folder.mkdir()
        self.process = start_cold(bench, self.folder, more)

    def sign(self, rank: int) -> Sign | None:
        found = sorted(self.folder.glob(f"runs/*/logs/attempt_*/rank_{rank}.heartbeat"))
        return read_sign(found[-1]) if found else None

    def reach(self, step: int, phase: str | None = None) -> None:
        def there() -> bool:
            sign = self.sign(0)
            return sign is not None and sign.step >= step and phase in (None, sign.phase)

        until(there, f"step {step} in phase {phase}")

    def send(self, target: str | int, number: signal.Signals) -> None:
        sign = None if target == LAUNCHER else self.sign(int(target))
        os.kill(self.process.pid if sign is None else sign.pid, number)

    def go_on(self) -> Story:
        """The same command on the warm server, to the end."""
        before, began = self.bench.belongings(), time.time()
        answer = self.bench.train(self.folder, self.more)
        return Story(self.folder, (answer,), time.time() - began, self.bench.left_behind(before, self.folder))


def require_no_step_twice(story: Story) -> None:
    for path in story.folder.glob("samples/rank_*.jsonl"):
        entries = map(json.loads, path.read_text().splitlines())
        steps = [entry["step"] for entry in entries if "step" in entry]
        assert steps == sorted(set(steps)), "wasted steps"


def require_same_step(folder: Path, code: int) -> None:
    last = [read_events(next((folder / "runs").iterdir()), rank)[-1] for rank in (0, 1)]
    assert [event["kind"] for event in last] == ["stop", "stop"]
    assert last[0]["step"] == last[1]["step"]
    assert last[0]["exit_code"] == code


@pytest.mark.parametrize("target", [0, 1, LAUNCHER])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_any_process_stops_all_at_one_step_and_no_step_is_wasted(
    bench: Bench, target: str | int, number: signal.Signals, code: int
) -> None:
    run = ColdRun(bench, f"stop-{target}-{code}")
    run.reach(9)
    run.send(target, number)
    answer = finish(run.process)
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    require_same_step(run.folder, code)
    story = run.go_on()
    assert story.differences(bench.undisturbed) == []
    require_no_step_twice(story)


@pytest.mark.parametrize("pause_s", [0.0, 0.05, 0.3])
def test_a_second_signal_while_the_first_is_obeyed_does_not_tear_the_save(bench: Bench, pause_s: float) -> None:
    run = ColdRun(bench, f"twice-{pause_s}")
    run.reach(9)
    run.send(LAUNCHER, signal.SIGTERM)
    time.sleep(pause_s)
    if run.process.poll() is None:
        run.send(LAUNCHER, signal.SIGTERM)
    answer = finish(run.process)
    assert answer.code == 143, answer.err
    require_same_step(run.folder, 143)
    story = run.go_on()
    assert story.differences(bench.undisturbed) == []
    require_no_step_twice(story)
