"""Probes on real files, processes and sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from orchestrator import probes
from orchestrator.probes import Cores, Gpu
from orchestrator.verdicts import GIB, MIB


def test_the_lock_is_read_without_what_is_for_other_platforms():
    text = (
        '# note\na==1.0 \\\n    --hash=sha256:00\nB.c[x]==9\nwin-only==2 ; sys_platform == "win32" \\\n    --hash=x\n'
    )
    text += "here==3 ; python_version >= '3.11'\n    # via a==7\n"
    assert probes.read_lock(text) == {"a": "1.0", "B.c": "9", "here": "3"}


def test_a_write_check_really_writes_and_leaves_nothing(tmp_path):
    assert probes.try_write(tmp_path) == tmp_path
    assert probes.try_write(tmp_path / "a" / "b") == tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody can make a file")
def test_a_write_check_raises_where_nothing_can_be_written():
    with pytest.raises(OSError, match=r".+"):
        probes.try_write(Path("/proc/self"))


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


def test_a_crash_in_the_subprocess_is_told_by_its_last_line():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        probes.ask_python("1 / 0", 30)
    with pytest.raises(RuntimeError, match="exit code 3"):
        probes.ask_python("raise SystemExit(3)", 30)
    with pytest.raises(subprocess.TimeoutExpired):
        probes.ask_python("import time; time.sleep(30)", 0.2)
