"""What `orchestrator status` and `ls` tell of runs that go on, ended, or were left without a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from histories import Costs, Simulation
from made_up_runs import MadeUpRun

from orchestrator.cli.main import main
from orchestrator.cluster.lock import holder, only_writer


def write_history(folder: Path, played: Simulation, state: str, prices: list[str]) -> Path:
    """A run folder with the events of a simulated history."""
    MadeUpRun(state=state).write(folder)
    bundle = json.loads((folder / "run.json").read_text())
    bundle["config"]["cluster"] = {"prices": prices, "currency": "EUR"}
    (folder / "run.json").write_text(json.dumps(bundle))
    size = {"total_steps": 60, "steps_per_epoch": 30, "num_samples": 300}
    for rank, events in played.ranks.items():
        lines = [{**event, **size} if event["kind"] == "start" else event for event in events]
        (folder / "events" / f"rank_{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events" / "launcher.jsonl").write_text("".join(json.dumps(line) + "\n" for line in played.launcher))
    return folder


@pytest.fixture
def killed_once() -> Simulation:
    kills = iter([5.0])
    return Simulation(Costs(), lambda: next(kills, float("inf"))).play()


def facts_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    assert main(["status", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_finished_run_tells_its_goodput_cost_and_fault(
    tmp_path: Path, killed_once: Simulation, capsys: pytest.CaptureFixture[str]
) -> None:
    write_history(tmp_path / "small-00000001", killed_once, "done", ["cpu=36"])
    facts = facts_of(capsys, "--runs-dir", tmp_path)
    assert (facts["state"], facts["step"], facts["total_steps"], facts["attempt"]) == ("done", 60, 60, 2)
    truth = killed_once.truth
    assert facts["goodput"] == pytest.approx(
        (truth["compute"] + truth["communication_wait"]) / sum(truth.values()), 0.01
    )
    assert sum(facts["seconds"].values()) == pytest.approx(facts["wall_s"], abs=0.02)  # pyright: ignore
    assert facts["cost"] == pytest.approx(2 * facts["wall_s"] / 100, rel=0.01)  # pyright: ignore
    assert (facts["wasted_steps"], facts["wasted_samples"]) == (killed_once.wasted_steps, 10 * killed_once.wasted_steps)
    assert facts["last_fault"]["error"] == "killed by SIGKILL"  # pyright: ignore
    assert main(["status", "small-00000001", "--runs-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "last fault     rank 1: killed by SIGKILL" in text
    assert "EUR" in text


def test_a_run_without_a_launcher_says_that_the_lock_is_free_and_what_goes_on_with_it(
    tmp_path: Path, killed_once: Simulation, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_history(tmp_path / "small-00000001", killed_once, "running", [])
    assert main(["status", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "not running: the lock is free" in text
    assert "next           orchestrator train experiment=quickstart optimizer.lr=0.02" in text
    assert "no price: cluster.prices" in text


def test_a_run_whose_lock_is_held_is_running_whatever_its_record_says(
    tmp_path: Path, killed_once: Simulation, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_history(tmp_path / "small-00000001", killed_once, "stopped", [])
    assert holder(folder) is None
    with only_writer(folder):
        assert holder(folder) == os.getpid()
        facts = facts_of(capsys, folder)
        assert (facts["state"], facts["launcher"]) == ("running", os.getpid())
    assert holder(folder) is None


def test_a_lock_file_that_names_a_living_process_without_its_lock_is_free(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(f"{os.getpid()}\n")
    assert holder(tmp_path) is None


def test_an_unknown_id_gets_the_nearest_one_and_42(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MadeUpRun(state="starting").write(tmp_path / "quickstart-0123abcd")
    assert main(["status", "quickstart-0123abce", "--runs-dir", str(tmp_path)]) == 42
    assert "did you mean 'quickstart-0123abcd'?" in capsys.readouterr().err
    assert main(["status", "--runs-dir", str(tmp_path / "none")]) == 42
    assert "no run there" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["starting", "running", "failed", "stopped", "done"])
def test_records_of_an_earlier_version_are_told_as_far_as_they_go(
    tmp_path: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    MadeUpRun(state=state, epochs=2).write(tmp_path / "quickstart-0123abcd")
    assert main(["status", "--runs-dir", str(tmp_path)]) == 0
    assert main(["ls", "--runs-dir", str(tmp_path)]) == 0
    assert main(["ls", f"runs_dir={tmp_path}"]) == 0
    assert "quickstart-0123abcd" in capsys.readouterr().out


def test_status_loads_no_torch(tmp_path: Path) -> None:
    MadeUpRun(epochs=2).write(tmp_path / "quickstart-0123abcd")
    code = "import sys; from orchestrator.cli.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "status", "--runs-dir", str(tmp_path)], check=True, capture_output=True)


def test_a_save_that_was_asked_for_but_is_not_durable_is_no_checkpoint(
    tmp_path: Path, killed_once: Simulation, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_history(tmp_path / "small-00000001", killed_once, "done", [])
    path = folder / "events" / "rank_0.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    saved = [event["step"] for event in events if event["kind"] == "saved"]
    path.write_text("".join(
        json.dumps(event) + "\n" for event in events if (event["kind"], event["step"]) != ("saved", saved[-1])
    ))  # fmt: skip
    checkpoint = facts_of(capsys, "--runs-dir", tmp_path)["checkpoint"]
    assert isinstance(checkpoint, dict)
    assert checkpoint["step"] == saved[-2] < saved[-1]
