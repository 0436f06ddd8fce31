"""`orchestrator doctor`: verdicts by tables, probes on real files and processes, and the command as a user runs it."""

from __future__ import annotations

import argparse
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator import doctor, probes, verdicts
from orchestrator.cli import doctor as command
from orchestrator.probes import Cores, Gpu
from orchestrator.verdicts import GIB, MIB, Finding, State

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


def test_a_runs_dir_that_is_a_file_ends_with_42_and_plain_lines(tmp_path):
    file = tmp_path / "taken"
    file.write_text("")
    done = run_command("--runs-dir", str(file))
    line = next(line for line in done.stdout.splitlines() if "write runs_dir" in line)
    assert done.returncode == 42
    assert line.startswith("fail  write runs_dir: ")
    assert "Not a directory" in line
    assert "Way out: runs_dir=PATH" in line
    assert "1 fail" in done.stdout.splitlines()[-1]
    assert "\x1b" not in done.stdout


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


def test_floors_are_those_of_the_package():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, floor in verdicts.FLOORS.items():
        assert any(line.split("[")[0].startswith(name) and f">={floor}" in line for line in wanted), name


PACKAGES = [
    ("torch", ["2.9.1"], State.fail, "2.9.1 is below the security floor 2.10"),
    ("torch", ["2.10.0"], State.ok, "2.10.0"),
    ("torch", ["2.14.1+cu130"], State.ok, "2.14.1+cu130"),
    ("torch", ["2.10.0rc1"], State.fail, "below the security floor"),
    ("pytorch-lightning", ["2.6.5"], State.fail, "2.6.6"),
    ("pytorch-lightning", ["2.6.6"], State.ok, "2.6.6"),
    ("hydra-core", ["1.3.2"], State.fail, "1.3.7"),
    ("hydra-core", ["1.3.10"], State.ok, "1.3.10"),
    ("ray", ["2.6"], State.fail, "2.56"),
    ("ray", ["2.56.0", "2.1"], State.ok, "2.56.0"),
    ("ray", ["2.1", "2.56.0"], State.fail, "2.1 is below"),
    ("ray", [], State.fail, "not installed"),
]


@pytest.mark.parametrize(("name", "versions", "state", "text"), PACKAGES)
def test_a_package_below_its_floor_fails_with_the_way_out(name, versions, state, text):
    finding = verdicts.judge_package(name, versions)
    assert (finding.state, finding.unfit) == (state, False)
    assert text in finding.found
    assert ("pip install" in finding.way_out) == (state is State.fail)


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_a_malicious_lightning_anywhere_on_the_path_fails(version):
    finding = verdicts.judge_malicious(["2.5.0", version])
    assert finding.state is State.fail
    assert "pip uninstall lightning" in finding.way_out
    assert "key" in finding.way_out


@pytest.mark.parametrize("versions", [[], ["2.6.1"], ["2.6.4"]])
def test_other_releases_of_lightning_pass(versions):
    assert verdicts.judge_malicious(versions).state is State.ok


def test_a_malicious_lightning_is_seen_by_its_metadata_alone(tmp_path, monkeypatch):
    metadata = tmp_path / "lightning-2.6.3.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: lightning\nVersion: 2.6.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = doctor.check_malicious(visit_with())
    assert (finding.state, "lightning" in sys.modules) == (State.fail, False)


def test_drift_from_the_lock_warns_with_each_package_and_a_count():
    locked = {f"p{i}": "1.0" for i in range(30)}
    same = {name: ["1.0+cu130"] for name in locked}
    assert verdicts.judge_lock(locked, same).state is State.ok
    assert verdicts.judge_lock(None, {}).state is State.ok
    finding = verdicts.judge_lock(locked, same | {"p0": ["2.0"], "p1": []})
    assert finding.state is State.warn
    assert "2 of 30 packages differ: p0 2.0 instead of 1.0, p1 absent instead of 1.0" in finding.found
    assert verdicts.judge_lock(locked, {}).found.endswith("and 10 more")


def test_the_lock_is_read_without_what_is_for_other_platforms():
    text = (
        '# note\na==1.0 \\\n    --hash=sha256:00\nB.c[x]==9\nwin-only==2 ; sys_platform == "win32" \\\n    --hash=x\n'
    )
    text += "here==3 ; python_version >= '3.11'\n    # via a==7\n"
    assert probes.read_lock(text) == {"a": "1.0", "B.c": "9", "here": "3"}


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 14, 0), "ok"), ((2, 7, 18), "fail")]
)
def test_python_is_judged_by_its_floor(version, state):
    assert verdicts.judge_python(version).state == state


THREADS = [
    (None, 2, 2, "ok"), ("1", 2, 2, "ok"), ("2", 1, 2, "ok"), ("2", 2, 2, "warn"), ("8", 1, 2, "warn"),
    ("0", 1, 2, "warn"), ("many", 1, 2, "warn"), ("1", 8, 2, "warn"),
]  # fmt: skip


@pytest.mark.parametrize(("omp", "processes", "cores", "state"), THREADS)
def test_threads_are_judged_against_cores_and_processes(omp, processes, cores, state):
    finding = verdicts.judge_threads(omp, processes, cores)
    assert finding.state == state
    if state == "warn":
        assert f"OMP_NUM_THREADS={max(1, cores // processes)}" in finding.way_out


SPACE = [
    (verdicts.judge_shm, 63 * MIB, "fail"), (verdicts.judge_shm, 64 * MIB, "warn"),
    (verdicts.judge_shm, GIB - 1, "warn"), (verdicts.judge_shm, GIB, "ok"),
    (verdicts.judge_disk, GIB - 1, "fail"), (verdicts.judge_disk, GIB, "warn"),
    (verdicts.judge_disk, 10 * GIB - 1, "warn"), (verdicts.judge_disk, 10 * GIB, "ok"),
    (verdicts.judge_memory, GIB - 1, "fail"), (verdicts.judge_memory, 2 * GIB, "warn"),
    (verdicts.judge_memory, 4 * GIB, "ok"),
]  # fmt: skip


@pytest.mark.parametrize(("judge", "free", "state"), SPACE)
def test_too_little_space_makes_the_node_unfit(judge, free, state):
    arguments = {
        verdicts.judge_shm: ((free, 100 * GIB),),
        verdicts.judge_disk: ("runs", free),
        verdicts.judge_memory: (100 * GIB, free),
    }
    finding = judge(*arguments[judge])
    assert (finding.state, finding.unfit, bool(finding.way_out)) == (state, state == "fail", state != "ok")
    assert verdicts.exit_code([finding]) == (44 if state == "fail" else 0)


def test_a_tiny_shm_names_the_switches_that_enlarge_it():
    finding = verdicts.judge_shm((32 * MIB, 64 * MIB))
    assert "32 MiB free of 64 MiB" in finding.found
    for way in ("--shm-size", "emptyDir", "data.num_workers=0"):
        assert way in finding.way_out
    assert verdicts.judge_shm(None).state is State.ok


def test_memory_counts_the_smaller_of_machine_and_cgroup():
    assert verdicts.judge_memory(64 * GIB, None).state is State.ok
    assert verdicts.judge_memory(2 * GIB, 64 * GIB).state is State.warn
    assert "cgroup limit 512 MiB" in verdicts.judge_memory(64 * GIB, 512 * MIB).found


WRITES = [(errno.EACCES, 42), (errno.EROFS, 42), (errno.ENOTDIR, 42), (errno.ENOSPC, 44), (errno.EDQUOT, 44)]


@pytest.mark.parametrize(("number", "code"), WRITES)
def test_a_folder_that_cannot_be_written_fails_and_a_full_disk_blames_the_node(number, code):
    finding = verdicts.judge_write("runs_dir", Path("runs"), OSError(number, os.strerror(number)), "runs_dir=PATH")
    assert verdicts.exit_code([finding]) == code
    assert os.strerror(number) in finding.found
    assert finding.way_out == "runs_dir=PATH"


def test_a_write_check_really_writes_and_leaves_nothing(tmp_path):
    assert probes.try_write(tmp_path) == tmp_path
    assert probes.try_write(tmp_path / "a" / "b") == tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody can make a file")
def test_a_write_check_raises_where_nothing_can_be_written():
    with pytest.raises(OSError, match=r".+"):
        probes.try_write(Path("/proc/self"))


OPEN_FILES = [
    (-1, -1, "ok", ""), (4096, 4096, "ok", ""), (1024, 1048576, "warn", "ulimit -n 65536"),
    (1024, -1, "warn", "ulimit -n 65536"), (1024, 1024, "warn", "hard limit of 1024"),
    (128, 4096, "fail", "ulimit -n 4096"),
]  # fmt: skip


@pytest.mark.parametrize(("soft", "hard", "state", "way_out"), OPEN_FILES)
def test_open_files_are_judged_with_a_limit_that_can_be_set(soft, hard, state, way_out):
    finding = verdicts.judge_open_files(soft, hard, -1)
    assert finding.state == state
    assert way_out in finding.way_out


H100 = Gpu(name="NVIDIA H100", memory_mib=81559, driver="580.65")
GPUS = [
    ([], 0, None, "ok", "CPU"), ([H100], 1, None, "ok", "NVIDIA H100 79.6 GiB, driver 580.65"),
    ([H100, H100], 1, "0", "warn", "CUDA_VISIBLE_DEVICES=0"), ([H100], 0, "", "warn", "0 of 1"),
    ([H100], 0, None, "fail", "built for CUDA 13.0"), ([], 2, None, "ok", "torch sees 2 GPUs"),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "usable", "visible", "state", "text"), GPUS)
def test_a_gpu_that_torch_cannot_use_fails_unless_it_was_hidden(seen, usable, visible, state, text):
    finding = verdicts.judge_gpus(seen, usable, "13.0", visible)
    assert (finding.state, finding.unfit) == (state, state == "fail")
    assert text in finding.found


def test_rows_of_the_driver_are_read_with_commas_in_names_and_memory_not_stated():
    text = "NVIDIA A100-SXM4, 40GB, 40536, 535.104\nNVIDIA GB10, [N/A], 580.1\n\n"
    assert probes.parse_gpus(text) == [
        Gpu(name="NVIDIA A100-SXM4, 40GB", memory_mib=40536, driver="535.104"),
        Gpu(name="NVIDIA GB10", memory_mib=0, driver="580.1"),
    ]


def test_a_broken_driver_tool_raises_with_its_words(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho couldn\\'t communicate with the driver\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(RuntimeError, match="communicate with the driver"):
        probes.read_gpus()


@pytest.mark.parametrize(
    ("version", "gpus", "state"), [("2.30", 1, "ok"), ("2.30", 0, "ok"), (None, 0, "ok"), (None, 1, "fail")]
)
def test_nccl_is_needed_on_gpus_only(version, gpus, state):
    assert verdicts.judge_nccl(version, gpus).state == state


@pytest.mark.parametrize(
    ("mode", "source", "state"), [("offline", None, "ok"), ("online", "netrc", "ok"), ("online", None, "warn")]
)
def test_a_missing_key_warns_only_where_one_is_needed(mode, source, state):
    assert verdicts.judge_wandb_key(mode, source).state == state


def test_nothing_about_wandb_ever_fails():
    findings = [verdicts.judge_wandb_server("u", "refused"), verdicts.judge_wandb_mode("onlin")]
    assert [f.state for f in findings] == [State.warn, State.warn]
    assert verdicts.judge_wandb_server("u", 404).state is State.ok


def finding_of(state: State, unfit: bool = False) -> Finding:
    return Finding(name="x", state=state, found="", unfit=unfit)


def test_the_exit_code_blames_the_user_before_the_node():
    fine, node, user = finding_of(State.warn, True), finding_of(State.fail, True), finding_of(State.fail)
    assert [verdicts.exit_code(f) for f in ([], [fine], [node], [user], [node, user], [user, fine])] == [
        0,
        0,
        44,
        42,
        42,
        42,
    ]


def write_files(root: Path, **files: str) -> None:
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


CGROUPS: dict[str, tuple[dict[str, str], int | None, float | None]] = {
    "v2 with limits on two levels": ({
        "proc/self/cgroup": "0::/pod/box\n",
        "sys/fs/cgroup/pod/box/memory.max": "max\n", "sys/fs/cgroup/pod/memory.max": "4294967296\n",
        "sys/fs/cgroup/pod/box/cpu.max": "150000 100000\n", "sys/fs/cgroup/pod/cpu.max": "max 100000\n",
    }, 4 * GIB, 1.5),
    "v1 whose path is the host's": ({
        "proc/self/cgroup": "9:cpu,cpuacct:/docker/abc\n8:memory:/docker/abc\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }, 512 * MIB, 0.5),
    "v1 without limits": ({
        "proc/self/cgroup": "8:memory:/a b\n3:cpu:/\n",
        "sys/fs/cgroup/memory/a b/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }, None, None),
    "a namespace that looks upwards": ({
        "proc/self/cgroup": "0::/../../box\n", "sys/fs/cgroup/memory.max": "1073741824\n",
    }, GIB, None),
    "no cgroups": ({}, None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CGROUPS)
def test_cgroup_limits_are_found(name, tmp_path):
    files, memory, quota = CGROUPS[name]
    write_files(tmp_path, **files)
    assert probes.read_memory(tmp_path)[1] == memory
    assert probes.read_cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("allowed", "quota", "usable"), [(8, None, 8), (8, 2.5, 2), (8, 0.5, 1), (2, 16.0, 2)])
def test_usable_cores_are_the_least_of_affinity_and_quota(allowed, quota, usable):
    assert Cores(online=64, allowed=allowed, quota=quota).usable == usable


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


def test_a_server_that_answers_with_any_status_is_reached():
    class Teapot(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(418)

        def log_message(self, format, *args):
            return

    with HTTPServer(("127.0.0.1", 0), Teapot) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert probes.ask_server(f"http://127.0.0.1:{server.server_port}", 3.0) == 418


def test_a_server_that_never_answers_is_given_up():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(OSError, match="timed out"):
            probes.ask_server(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2)


def test_a_probe_that_hangs_does_not_hold_the_others():
    hanging = probes.in_background(threading.Event().wait)
    with pytest.raises(TimeoutError):
        hanging.result(0.05)
    assert probes.in_background(int, "7").result(5) == 7


def test_a_key_in_netrc_is_found_by_host_without_being_read_out(tmp_path, monkeypatch):
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai login user password secret\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    assert (probes.netrc_has("api.wandb.ai"), probes.netrc_has("elsewhere")) == (True, False)
    assert doctor.check_wandb_key(visit_with()).found == "configured in netrc"


def test_a_crash_in_the_subprocess_is_told_by_its_last_line():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        probes.ask_python("1 / 0", 30)
    with pytest.raises(RuntimeError, match="exit code 3"):
        probes.ask_python("raise SystemExit(3)", 30)
    with pytest.raises(subprocess.TimeoutExpired):
        probes.ask_python("import time; time.sleep(30)", 0.2)
