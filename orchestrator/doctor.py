"""`orchestrator doctor`: look at this machine from Python to W&B and say what would stop or slow a run."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator import probes, verdicts
from orchestrator.verdicts import Finding

SUBPROCESS_TIMEOUT_S = 30.0
SERVER_TIMEOUT_S = 3.0
HOSTNAME_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What one examination was asked, and the slow probes that run meanwhile."""

    runs_dir: str
    processes: int | None
    """Processes meant for this machine; None: one per GPU, else 1."""
    torch: Future[dict[str, Any]]
    ray: Future[str]
    gpus: Future[list[probes.Gpu]]
    hostname: Future[tuple[str, str]]
    server: Future[int]


def start_visit(runs_dir: str, processes: int | None = None) -> Visit:
    """Start every probe that waits for something, so that their waits overlap."""
    return Visit(
        runs_dir=runs_dir,
        processes=processes,
        torch=probes.in_background(probes.ask_torch, SUBPROCESS_TIMEOUT_S),
        ray=probes.in_background(probes.ask_ray, SUBPROCESS_TIMEOUT_S),
        gpus=probes.in_background(probes.read_gpus),
        hostname=probes.in_background(probes.resolve_hostname),
        server=probes.in_background(probes.ask_server, wandb_url(), SERVER_TIMEOUT_S),
    )


def wandb_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def is_remote(runs_dir: str) -> bool:
    return "://" in runs_dir


def check_python(_: Visit) -> Finding:
    return verdicts.judge_python(sys.version_info[:3])


def _check_package(name: str) -> Check:
    return lambda _: verdicts.judge_package(name, probes.read_packages([name])[name])


def check_malicious(_: Visit) -> Finding:
    return verdicts.judge_malicious(probes.read_packages(["lightning"])["lightning"])


def check_lock(_: Visit) -> Finding:
    file = probes.PACKAGE_ROOT / "requirements.lock"
    locked = probes.read_lock(file.read_text()) if file.is_file() else None
    return verdicts.judge_lock(locked, probes.read_packages(locked or {}))


def check_cores(_: Visit) -> Finding:
    return verdicts.judge_cores(probes.read_cores())


def check_threads(visit: Visit) -> Finding:
    processes = visit.processes or max(1, _wait(visit.torch)["gpus"])
    return verdicts.judge_threads(os.environ.get("OMP_NUM_THREADS"), processes, probes.read_cores().usable)


def check_gpus(visit: Visit) -> Finding:
    facts = _wait(visit.torch)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return verdicts.judge_gpus(_wait(visit.gpus), facts["gpus"], facts["cuda"], visible)


def check_shm(_: Visit) -> Finding:
    return verdicts.judge_shm(probes.read_shm())


def check_memory(_: Visit) -> Finding:
    return verdicts.judge_memory(*probes.read_memory())


def check_disk(visit: Visit) -> Finding:
    if is_remote(visit.runs_dir):
        return verdicts.ok("disk", f"{visit.runs_dir} is an object store, its space is not checked")
    return verdicts.judge_disk(visit.runs_dir, probes.read_space(Path(visit.runs_dir))[0])


def check_write_runs(visit: Visit) -> Finding:
    if is_remote(visit.runs_dir):
        return verdicts.ok("write runs_dir", f"{visit.runs_dir} is an object store, writing is not tried")
    return _check_write("runs_dir", Path(visit.runs_dir), "runs_dir=PATH that this user may write to")


def check_write_cache(_: Visit) -> Finding:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return _check_write("cache", folder, "export XDG_CACHE_HOME=PATH that this user may write to")


def check_write_temp(_: Visit) -> Finding:
    return _check_write("temp", Path(tempfile.gettempdir()), "export TMPDIR=PATH that this user may write to")


def _check_write(what: str, folder: Path, way_out: str) -> Finding:
    outcome: Path | OSError
    try:
        outcome = probes.try_write(folder)
    except OSError as error:
        outcome = error
    return verdicts.judge_write(what, folder, outcome, way_out)


def check_open_files(_: Visit) -> Finding:
    import resource

    return verdicts.judge_open_files(*probes.read_open_files(), resource.RLIM_INFINITY)


def check_gloo(visit: Visit) -> Finding:
    return verdicts.judge_gloo(_wait(visit.torch)["gloo_error"])


def check_nccl(visit: Visit) -> Finding:
    facts = _wait(visit.torch)
    return verdicts.judge_nccl(facts["nccl"], facts["gpus"])


def check_port(_: Visit) -> Finding:
    try:
        return verdicts.ok("port", f"TCP port {probes.take_port()} on 127.0.0.1 could be taken")
    except OSError as error:
        return verdicts.fail("port", f"no TCP port on 127.0.0.1: {error}", "allow listening on loopback", unfit=True)


def check_hostname(visit: Visit) -> Finding:
    try:
        name, address = visit.hostname.result(HOSTNAME_TIMEOUT_S)
        return verdicts.ok("hostname", f"{name} is {address}")
    except (OSError, TimeoutError) as error:
        found = f"this machine's own name does not resolve: {error or 'no answer in time'}"
        return verdicts.warn("hostname", found, "add the name to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo")


def check_ray(visit: Visit) -> Finding:
    return verdicts.ok("ray import", f"{_wait(visit.ray)} imports (not started)")


def check_kubernetes(_: Visit) -> Finding:
    named = os.environ.get("KUBECONFIG", "").split(os.pathsep)[0]
    config = Path(named) if named else Path.home() / ".kube" / "config"
    return verdicts.judge_kubernetes(shutil.which("kubectl"), config, "KUBERNETES_SERVICE_HOST" in os.environ)


def _wandb_mode() -> str:
    return os.environ.get("WANDB_MODE", "offline")


def check_wandb_mode(_: Visit) -> Finding:
    return verdicts.judge_wandb_mode(_wandb_mode())


def check_wandb_key(_: Visit) -> Finding:
    if os.environ.get("WANDB_API_KEY"):
        source = "WANDB_API_KEY"
    else:
        source = "netrc" if probes.netrc_has(urlsplit(wandb_url()).hostname or "") else None
    return verdicts.judge_wandb_key(_wandb_mode(), source)


def check_wandb_server(visit: Visit) -> Finding:
    outcome: int | str
    try:
        outcome = visit.server.result(SERVER_TIMEOUT_S)
    except TimeoutError:
        outcome = f"no answer in {SERVER_TIMEOUT_S:g} s"
    except (OSError, ValueError) as error:
        outcome = str(error)
    return verdicts.judge_wandb_server(wandb_url(), outcome)


def check_decoder(_: Visit) -> Finding:
    from orchestrator.data.kernel import load_kernel

    kernel = load_kernel()
    return verdicts.judge_decoder(kernel if isinstance(kernel, str) else None)


def check_git(_: Visit) -> Finding:
    return verdicts.judge_git(shutil.which("git"))


def _wait(future: Future[Any]) -> Any:
    return future.result(SUBPROCESS_TIMEOUT_S + 5)


Check = Callable[[Visit], Finding]

CHECKS: tuple[tuple[str, Check], ...] = (
    ("python", check_python),
    *((name, _check_package(name)) for name in verdicts.FLOORS),
    ("lightning", check_malicious),
    ("requirements.lock", check_lock),
    ("cpu", check_cores),
    ("shared memory", check_shm),
    ("memory", check_memory),
    ("disk", check_disk),
    ("write runs_dir", check_write_runs),
    ("write cache", check_write_cache),
    ("write temp", check_write_temp),
    ("open files", check_open_files),
    ("port", check_port),
    ("hostname", check_hostname),
    ("git", check_git),
    ("image decoder", check_decoder),
    ("kubernetes", check_kubernetes),
    ("wandb mode", check_wandb_mode),
    ("wandb key", check_wandb_key),
    ("wandb server", check_wandb_server),
    ("ray import", check_ray),
    ("gpu", check_gpus),
    ("threads", check_threads),
    ("gloo", check_gloo),
    ("nccl", check_nccl),
)
"""In the order of the report: what waits for a subprocess comes last."""


def examine(visit: Visit) -> Iterator[Finding]:
    """Run every check; one that breaks becomes a warning of its own and stops none of the others."""
    for name, check in CHECKS:
        yield run_check(name, check, visit)


def run_check(name: str, check: Check, visit: Visit) -> Finding:
    try:
        return check(visit)
    except Exception as error:
        text = f"could not be checked: {type(error).__name__}: {error}"
        return verdicts.warn(name, text, "look into the message; the other checks are not affected")
