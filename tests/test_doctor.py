"""`orchestrator doctor` as a user runs it, and how its checks are joined."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from orchestrator import doctor, probes, verdicts
from orchestrator.cli import doctor as command
from orchestrator.verdicts import Finding, State

ROOT = Path(__file__).resolve().parent.parent


CALL = """
import argparse, sys
from orchestrator.cli import doctor
parser = argparse.ArgumentParser("orchestrator")
doctor.add_to(parser.add_subparsers())
args = parser.parse_args(["doctor", *sys.argv[1:]])
sys.exit(args.run(args))
"""


def run_command(*args: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "OMP_", "CUDA_"))}
    env = clean | {"PYTHONPATH": str(ROOT)} | environment
    call = [sys.executable, "-c", CALL, *args]
    return subprocess.run(call, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], float, Path]:
    folder = tmp_path_factory.mktemp("doctor")
    started = time.monotonic()
    done = run_command(
        "--json", "--runs-dir", str(folder / "new" / "runs"), cwd=folder, WANDB_API_KEY="never-shown-7f3a"
    )
    return done, time.monotonic() - started, folder


def test_the_real_command_finds_nothing_that_fails_here(report):
    done, seconds, _ = report
    findings = json.loads(done.stdout)
    amiss = {f["name"]: f["found"] for f in findings if f["state"] != "ok"}
    allowed = {"wandb server", "hostname", "open files", "requirements.lock", "disk", "git", "memory", "shared memory"}
    assert done.returncode == 0, done.stdout + done.stderr
    assert amiss.keys() <= allowed
    assert done.stderr == "", "off a terminal there is neither a progress bar nor a warning"
    assert seconds < 30


def test_json_has_one_object_of_four_texts_for_each_check_in_order(report):
    findings = json.loads(report[0].stdout)
    assert [f["name"] for f in findings] == [name for name, _ in doctor.CHECKS]
    for finding in findings:
        assert list(finding) == ["name", "state", "found", "way_out"]
        assert all(isinstance(value, str) for value in finding.values())
        assert finding["state"] in ("ok", "warn", "fail")
        assert bool(finding["way_out"]) == (finding["state"] != "ok"), "a way out stands exactly where one is needed"


def test_the_real_command_leaves_no_trace_and_shows_no_key(report):
    done, _, folder = report
    assert list(folder.iterdir()) == []
    assert "never-shown" not in done.stdout + done.stderr
    key = next(f for f in json.loads(done.stdout) if f["name"] == "wandb key")
    assert key["found"] == "configured in WANDB_API_KEY"


def test_a_runs_dir_that_is_a_file_ends_with_42_and_plain_lines(tmp_path, monkeypatch, capsys):
    file = tmp_path / "taken"
    file.write_text("")
    monkeypatch.setattr(doctor, "start_visit", lambda runs_dir, processes: visit_with(runs_dir=runs_dir, gpus=[]))
    code = command.run_doctor(argparse.Namespace(json=False, runs_dir=str(file), processes=None))
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if "write runs_dir" in line)
    assert code == 42
    assert line == f"fail  write runs_dir: {file}: Not a directory. Way out: runs_dir=PATH that this user may write to"
    assert lines[-1].endswith("1 fail")


def test_importing_the_command_and_its_checks_imports_no_heavy_package():
    heavy = "{'torch', 'ray', 'rich', 'wandb'}"
    code = f"import sys, orchestrator.cli.doctor, orchestrator.doctor; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "set()", done.stderr


def test_help_gives_two_examples(capsys):
    parser = argparse.ArgumentParser("orchestrator")
    command.add_to(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["doctor", "--help"])
    assert capsys.readouterr().out.count("\n  orchestrator doctor ") == 2


@pytest.mark.parametrize("text", ["0", "-1", "two", ""])
def test_a_number_of_processes_that_is_none_is_refused(text):
    parser = argparse.ArgumentParser("orchestrator")
    command.add_to(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["doctor", f"--processes={text}"])


def test_the_table_on_a_terminal_shows_states_and_ways_out(capsys):
    command._print_table([verdicts.ok("disk", "[big] enough"), verdicts.fail("port", "none", "free one")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == [
        "ok    disk  [big] enough",
        "fail  port  none",
        "            → free one",
        "1 ok, 0 warn, 1 fail",
    ]


def test_a_malicious_lightning_is_seen_by_its_metadata_alone(tmp_path, monkeypatch):
    metadata = tmp_path / "lightning-2.6.3.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: lightning\nVersion: 2.6.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = doctor.check_malicious(visit_with())
    assert (finding.state, "lightning" in sys.modules) == (State.fail, False)


def visit_with(**slow: Any) -> doctor.Visit:
    """A visit whose slow probes have already answered, an exception being an answer too."""
    answers: dict[str, Future[Any]] = {}
    for name in ("torch", "ray", "gpus", "hostname", "server"):
        answers[name] = Future()
        answer = slow.get(name, OSError("not asked"))
        if isinstance(answer, BaseException):
            answers[name].set_exception(answer)
        else:
            answers[name].set_result(answer)
    return doctor.Visit(runs_dir=slow.get("runs_dir", "runs"), processes=slow.get("processes"), **answers)


def test_a_check_that_breaks_is_a_warning_and_the_others_go_on(monkeypatch):
    def broken(_: doctor.Visit) -> Finding:
        raise KeyError("surprise")

    monkeypatch.setattr(doctor, "CHECKS", (("odd", broken), ("python", doctor.check_python)))
    odd, python = doctor.examine(visit_with())
    assert (odd.name, odd.state) == ("odd", State.warn)
    assert "KeyError: 'surprise'" in odd.found
    assert python.state is State.ok


def test_a_torch_that_does_not_import_turns_its_four_checks_into_warnings():
    visit = visit_with(torch=RuntimeError("ModuleNotFoundError: torch"), gpus=[])
    findings = {f.name: f for f in doctor.examine(visit)}
    for name in ("gpu", "threads", "gloo", "nccl"):
        assert findings[name].state is State.warn
        assert "ModuleNotFoundError" in findings[name].found


def test_an_object_store_is_not_searched_for_on_disk():
    visit = visit_with(runs_dir="s3://bucket/runs")
    assert {doctor.check_disk(visit).state, doctor.check_write_runs(visit).state} == {State.ok}


def test_a_hostname_that_does_not_resolve_warns():
    assert doctor.check_hostname(visit_with(hostname=socket.gaierror("unknown"))).state is State.warn
    assert doctor.check_hostname(visit_with(hostname=("box", "10.0.0.1"))).found == "box is 10.0.0.1"


def test_a_gloo_error_makes_the_node_unfit():
    finding = doctor.check_gloo(visit_with(torch={"gloo_error": "RuntimeError: refused"}))
    assert (finding.state, finding.unfit) == (State.fail, True)
    assert "refused" in finding.found


def test_a_key_in_netrc_is_found_by_host_without_being_read_out(tmp_path, monkeypatch):
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai login user password secret\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    assert (probes.netrc_has("api.wandb.ai"), probes.netrc_has("elsewhere")) == (True, False)
    assert doctor.check_wandb_key(visit_with()).found == "configured in netrc"
