"""What each fact about a machine means for a run, by tables."""

from __future__ import annotations

import errno
import os
import tomllib
from pathlib import Path

import pytest

from orchestrator import verdicts
from orchestrator.probes import Gpu
from orchestrator.verdicts import GIB, MIB, Finding, State

ROOT = Path(__file__).resolve().parent.parent


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


def test_drift_from_the_lock_warns_with_each_package_and_a_count():
    locked = {f"p{i}": "1.0" for i in range(30)}
    same = {name: ["1.0+cu130"] for name in locked}
    assert verdicts.judge_lock(locked, same).state is State.ok
    assert verdicts.judge_lock(None, {}).state is State.ok
    finding = verdicts.judge_lock(locked, same | {"p0": ["2.0"], "p1": []})
    assert finding.state is State.warn
    assert "2 of 30 packages differ: p0 2.0 instead of 1.0, p1 absent instead of 1.0" in finding.found
    assert verdicts.judge_lock(locked, {}).found.endswith("and 10 more")


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
