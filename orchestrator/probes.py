"""What this machine is and allows: thin effects that return plain facts and judge nothing."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
UNLIMITED = 1 << 60
"""cgroup v1 writes 'no limit' as a number of this size."""


def in_background(probe: Callable[..., T], *args: object) -> Future[T]:
    """Start a probe that may hang; its thread never keeps the process alive."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(probe(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """CPU cores: `online` in the machine, `allowed` by affinity, `quota` by cgroup (None: no limit)."""

    online: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Whole cores that this process can keep busy, at least 1."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, int(self.quota)))


def read_cores(root: Path = Path("/")) -> Cores:
    online = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else online
    return Cores(online=online, allowed=allowed, quota=read_cpu_quota(root))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _cgroup_files(root: Path, controller: str, v1_name: str, v2_name: str) -> list[Path]:
    """Files that may hold a limit of this process: its group and every group above it, v2 and v1."""
    files: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", controller) and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        parts = [part for part in path.split("/") if part and part != ".."]
        groups = [mount.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]
        files += [group / (v1_name if controllers else v2_name) for group in groups]
    return files


def read_cpu_quota(root: Path = Path("/")) -> float | None:
    """The tightest cgroup quota in cores, or None."""
    quotas: list[float] = []
    for file in _cgroup_files(root, "cpu", "cpu.cfs_quota_us", "cpu.max"):
        words = _text(file).split()
        if file.name == "cpu.cfs_quota_us":
            words += _text(file.with_name("cpu.cfs_period_us")).split()
        if len(words) == 2 and words[0].isdecimal() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def read_memory(root: Path = Path("/")) -> tuple[int, int | None]:
    """Bytes of memory in the machine, and the tightest cgroup limit (None: no limit)."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits: list[int] = []
    for file in _cgroup_files(root, "memory", "memory.limit_in_bytes", "memory.max"):
        words = _text(file).split()
        if words and words[0].isdecimal() and int(words[0]) < UNLIMITED:
            limits.append(int(words[0]))
    return total, min(limits, default=None)


def read_space(folder: Path) -> tuple[int, int]:
    """Bytes free to this user and in total on the file system of `folder`, or of its nearest existing parent."""
    status = os.statvfs(nearest_existing(folder))
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def read_shm(folder: Path = Path("/dev/shm")) -> tuple[int, int] | None:
    """Bytes free and in total of shared memory; zeros where Linux has none mounted, None on other systems."""
    if not sys.platform.startswith("linux"):
        return None
    return read_space(folder) if folder.is_dir() else (0, 0)


def nearest_existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def try_write(folder: Path) -> Path:
    """Write, fsync and remove a file in `folder` or its nearest existing parent; returns where. Raises OSError."""
    place = nearest_existing(folder)
    with tempfile.NamedTemporaryFile(dir=place, prefix=".write-check-") as file:
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    return place


def read_open_files() -> tuple[int, int]:
    """Soft and hard limit of open files."""
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)


def take_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        return server.getsockname()[1]


def resolve_hostname() -> tuple[str, str]:
    """This machine's name and its first address. Raises OSError."""
    name = socket.gethostname()
    return name, str(socket.getaddrinfo(name, None)[0][4][0])


def ask_server(url: str, timeout_s: float) -> int:
    """HTTP status of `url`; any status means that the server answers. Raises OSError."""
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=timeout_s) as answer:
            return answer.status
    except HTTPError as error:
        return error.code
    except URLError as error:
        raise OSError(str(error.reason)) from error


def netrc_has(host: str) -> bool:
    """Whether a key for `host` stands in the netrc file; the key itself is not returned."""
    import netrc

    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        if file.is_file():
            return netrc.netrc(str(file)).authenticators(host) is not None
    return False


def read_packages(names: Iterable[str]) -> dict[str, list[str]]:
    """Every installed version of each named distribution, the one that imports first in front; nothing is imported."""
    from importlib.metadata import distributions

    return {name: [dist.version for dist in distributions(name=name)] for name in names}


LOCK_LINE = re.compile(
    r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]\n]*\])?==([^\s;\\]+)[ \t]*(?:;([^\\\n]+))?", re.MULTILINE
)


def read_lock(text: str) -> dict[str, str]:
    """Name and version of each requirement that applies to this platform."""
    from packaging.markers import Marker

    found = LOCK_LINE.findall(text)
    return {name: version for name, version, marker in found if not marker.strip() or Marker(marker.strip()).evaluate()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as the driver sees it."""

    name: str
    memory_mib: int
    driver: str


def read_gpus(timeout_s: float = 10.0) -> list[Gpu]:
    """The NVIDIA GPUs that the driver lists; empty without the driver's tool. Raises where the tool fails."""
    import shutil

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"nvidia-smi failed: {(done.stdout + done.stderr).strip()[-200:]}")
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[Gpu]:
    """Rows `name, MiB, driver`; memory that the driver does not state (shared memory) counts as 0."""
    rows = [[cell.strip() for cell in line.rsplit(",", 2)] for line in text.splitlines() if line.count(",") >= 2]
    return [Gpu(name=name, memory_mib=int(mib) if mib.isdecimal() else 0, driver=driver) for name, mib, driver in rows]


def ask_python(statement: str, timeout_s: float) -> dict[str, Any]:
    """Run a statement that prints one JSON object last in a fresh interpreter, so that a crash or hang stays there."""
    path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", statement]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    if done.returncode:
        raise RuntimeError(_last_line(done.stderr) or f"ended with exit code {done.returncode}")
    return json.loads(_last_line(done.stdout))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def ask_torch(timeout_s: float) -> dict[str, Any]:
    """What torch can do here, see `describe_torch`; torch is imported in a subprocess only."""
    call = "import json; from orchestrator import probes; print(json.dumps(probes.describe_torch()))"
    return ask_python(call, timeout_s)


def ask_ray(timeout_s: float) -> str:
    """The version of Ray that imports; Ray is not started."""
    return ask_python("import json, ray; print(json.dumps({'version': ray.__version__}))", timeout_s)["version"]


def describe_torch() -> dict[str, Any]:
    """GPUs, NCCL and a gloo group as torch sees them; runs in the subprocess of `ask_torch`."""
    import torch
    import torch.distributed as dist
    from torch.cuda import nccl

    has_nccl = dist.is_available() and dist.is_nccl_available()
    return {
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "nccl": ".".join(map(str, nccl.version())) if has_nccl else None,
        "gloo_error": _try_gloo(),
    }


def _try_gloo() -> str | None:
    """Form a group of one process on loopback and reduce over it; the error's text, or None."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    try:
        timeout = timedelta(seconds=5)
        store = TCPStore("127.0.0.1", 0, world_size=1, is_master=True, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timeout)
        value = torch.ones(8)
        dist.all_reduce(value)
        dist.destroy_process_group()
        return None if float(value.sum()) == 8 else f"all-reduce of eight ones gave {value.tolist()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
