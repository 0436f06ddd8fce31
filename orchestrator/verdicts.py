"""What each fact about a machine means for a run: ok, warn or fail, the rule, and the way out. Pure."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from orchestrator.errors import EXIT_DONE, EXIT_NODE, EXIT_USER
from orchestrator.probes import Cores, Gpu

MIB = 1 << 20
GIB = 1 << 30

PYTHON_FLOOR = (3, 11)
FLOORS = {"torch": "2.10", "pytorch-lightning": "2.6.6", "hydra-core": "1.3.7", "ray": "2.56"}
"""Lowest version of each package without a known hole that a training run would open."""
MALICIOUS_LIGHTNING = ("2.6.2", "2.6.3")
"""Releases of `lightning` that were published by a thief and read credentials on import."""

SHM_WARN, SHM_FAIL = GIB, 64 * MIB
"""Loader processes hand batches over in shared memory: 64 MiB hold one batch of 100 images at 224 pixels in fp32."""
DISK_WARN, DISK_FAIL = 10 * GIB, GIB
MEMORY_WARN, MEMORY_FAIL = 4 * GIB, GIB
FILES_WARN, FILES_FAIL = 4096, 256

INSTALL = "pip install -r requirements.lock"


class State(StrEnum):
    """How bad it is: `fail` ends a run, `warn` may cost time or a feature."""

    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report: `found` carries the numbers and the rule; `unfit` blames the node instead of the user."""

    name: str
    state: State
    found: str
    way_out: str = ""
    unfit: bool = False

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "state": self.state.value, "found": self.found, "way_out": self.way_out}


def ok(name: str, found: str) -> Finding:
    return Finding(name=name, state=State.ok, found=found)


def warn(name: str, found: str, way_out: str) -> Finding:
    return Finding(name=name, state=State.warn, found=found, way_out=way_out)


def fail(name: str, found: str, way_out: str, *, unfit: bool = False) -> Finding:
    return Finding(name=name, state=State.fail, found=found, way_out=way_out, unfit=unfit)


def exit_code(findings: Sequence[Finding]) -> int:
    """A user's mistake outweighs an unfit node: another node would not mend it."""
    failed = [finding for finding in findings if finding.state is State.fail]
    if not failed:
        return EXIT_DONE
    return EXIT_NODE if all(finding.unfit for finding in failed) else EXIT_USER


def size(value: int) -> str:
    """Bytes for people: GiB from 1 GiB on, else MiB."""
    return f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / MIB:.0f} MiB"


def _by_bounds(found: str, name: str, value: float, bounds: tuple[float, float], way_out: str) -> Finding:
    """`bounds`: below the first a warning, below the second a node that is unfit."""
    low, least = bounds
    if value >= low:
        return ok(name, found)
    if value >= least:
        return warn(name, found, way_out)
    return fail(name, found, way_out, unfit=True)


def judge_python(version: tuple[int, ...]) -> Finding:
    text, floor = ".".join(map(str, version[:3])), ".".join(map(str, PYTHON_FLOOR))
    if tuple(version[:2]) >= PYTHON_FLOOR:
        return ok("python", f"{text} (needs {floor} or newer)")
    return fail("python", f"{text} is older than {floor}", f"make a virtual environment with Python {floor}")


def judge_package(name: str, versions: Sequence[str]) -> Finding:
    """`versions`: all installed copies, the one that imports first in front."""
    from packaging.version import Version

    floor = FLOORS[name]
    if not versions:
        return fail(name, f"not installed (needs {floor} or newer)", INSTALL)
    if Version(versions[0]) < Version(floor):
        return fail(name, f"{versions[0]} is below the security floor {floor}", f"pip install '{name}>={floor}'")
    return ok(name, f"{versions[0]} (security floor {floor})")


def judge_malicious(versions: Sequence[str]) -> Finding:
    bad = " and ".join(MALICIOUS_LIGHTNING)
    if set(versions) & set(MALICIOUS_LIGHTNING):
        way_out = "pip uninstall lightning, then replace every key and token that this account could read"
        return fail("lightning", f"{', '.join(versions)} is installed: releases {bad} steal credentials", way_out)
    return ok("lightning", f"{', '.join(versions) or 'not installed'} (malicious releases {bad} absent)")


def judge_lock(locked: Mapping[str, str] | None, installed: Mapping[str, Sequence[str]]) -> Finding:
    """`locked` is None where no lock file stands beside the package; a local label such as +cu130 does not count."""
    if locked is None:
        return ok("requirements.lock", "none beside the package, nothing to compare")
    drift = [
        f"{name} {installed[name][0] if installed.get(name) else 'absent'} instead of {version}"
        for name, version in locked.items()
        if not installed.get(name) or installed[name][0].split("+")[0] != version.split("+")[0]
    ]
    if not drift:
        return ok("requirements.lock", f"all {len(locked)} packages as locked")
    listed = ", ".join(drift[:20]) + (f" and {len(drift) - 20} more" if len(drift) > 20 else "")
    return warn("requirements.lock", f"{len(drift)} of {len(locked)} packages differ: {listed}", INSTALL)


def judge_cores(cores: Cores) -> Finding:
    quota = "no cgroup quota" if cores.quota is None else f"cgroup quota {cores.quota:g}"
    found = f"{cores.usable} cores usable ({cores.online} online, {cores.allowed} by affinity, {quota})"
    return ok("cpu", found)


def judge_threads(omp: str | None, processes: int, cores: int) -> Finding:
    """OMP_NUM_THREADS times the processes of this machine must not exceed its cores."""
    fair = max(1, cores // processes)
    if omp is None:
        return ok("threads", f"OMP_NUM_THREADS unset: compute.threads_per_process decides ({cores} cores)")
    if not omp.isdecimal() or int(omp) < 1:
        return warn("threads", f"OMP_NUM_THREADS={omp} is not a number from 1 up", f"export OMP_NUM_THREADS={fair}")
    total = int(omp) * processes
    found = f"OMP_NUM_THREADS={omp} x {processes} processes = {total} threads on {cores} cores"
    if total > cores:
        return warn("threads", found, f"export OMP_NUM_THREADS={fair}, or unset it")
    return ok("threads", found)


def judge_gpus(seen: Sequence[Gpu], usable: int, cuda: str | None, visible: str | None) -> Finding:
    """`seen` by the driver, `usable` by torch built for `cuda`, `visible` = CUDA_VISIBLE_DEVICES."""
    listed = ", ".join(f"{gpu.name} {size(gpu.memory_mib * MIB)}" for gpu in seen)
    if not seen:
        return ok("gpu", f"torch sees {usable} GPUs" if usable else "none: training runs on the CPU")
    found = f"{usable} of {len(seen)} usable: {listed}, driver {seen[0].driver}"
    if usable == len(seen):
        return ok("gpu", found)
    if visible is not None:
        return warn("gpu", f"{found}; CUDA_VISIBLE_DEVICES={visible}", "unset CUDA_VISIBLE_DEVICES to use all")
    needs = f"this torch is built for CUDA {cuda}" if cuda else "this torch is built without CUDA"
    way_out = "install the torch build for this driver, or update the driver; `nvidia-smi` lists what it supports"
    return fail("gpu", f"{found}; {needs}", way_out, unfit=True)


def judge_shm(space: tuple[int, int] | None) -> Finding:
    """`space`: bytes free and in total; None on systems without /dev/shm."""
    if space is None:
        return ok("shared memory", "this system has no /dev/shm, none is needed")
    free, total = space
    found = f"/dev/shm {size(free)} free of {size(total)} (needs {size(SHM_WARN)}; workers fail below {size(SHM_FAIL)})"
    way_out = "docker: --shm-size=8g; Kubernetes: an emptyDir with medium Memory at /dev/shm; or data.num_workers=0"
    return _by_bounds(found, "shared memory", free, (SHM_WARN, SHM_FAIL), way_out)


def judge_memory(total: int, limit: int | None) -> Finding:
    cgroup = "no cgroup limit" if limit is None else f"cgroup limit {size(limit)}"
    found = f"{size(total)}, {cgroup} (needs {size(MEMORY_WARN)}, at least {size(MEMORY_FAIL)})"
    usable = total if limit is None else min(total, limit)
    way_out = "raise the container's memory limit, or use fewer processes and data.num_workers=0"
    return _by_bounds(found, "memory", usable, (MEMORY_WARN, MEMORY_FAIL), way_out)


def judge_disk(runs_dir: str, free: int) -> Finding:
    found = f"{size(free)} free for {runs_dir} (needs {size(DISK_WARN)}, at least {size(DISK_FAIL)})"
    way_out = "orchestrator rm old runs, or runs_dir=PATH on a larger disk"
    return _by_bounds(found, "disk", free, (DISK_WARN, DISK_FAIL), way_out)


def judge_write(what: str, folder: Path, outcome: Path | OSError, way_out: str) -> Finding:
    """`outcome`: the folder where a file was written, or what stopped it."""
    name = f"write {what}"
    if isinstance(outcome, OSError):
        full = outcome.errno in (errno.ENOSPC, errno.EDQUOT)
        return fail(name, f"{folder}: {outcome.strerror or outcome}", way_out, unfit=full)
    where = f"{folder}" if outcome == folder.expanduser().absolute() else f"{folder} can be made in {outcome}"
    return ok(name, f"{where} (a file was written and removed)")


def judge_open_files(soft: int, hard: int, unlimited: int) -> Finding:
    """Limits of open files; `unlimited` is the system's word for none."""
    if unlimited in (soft, hard) and soft == unlimited:
        return ok("open files", "no limit")
    found = f"limit {soft} (needs {FILES_WARN}, at least {FILES_FAIL})"
    most = 65536 if hard == unlimited else min(hard, 65536)
    way_out = f"ulimit -n {most}" if most > soft else f"raise the hard limit of {hard}, e.g. in limits.conf"
    return _by_bounds(found, "open files", soft, (FILES_WARN, FILES_FAIL), way_out)


def judge_gloo(error: str | None) -> Finding:
    if error is None:
        return ok("gloo", "a group of one process formed and reduced on loopback")
    return fail(
        "gloo", f"no group on loopback: {error}", "allow TCP on 127.0.0.1 in the sandbox or firewall", unfit=True
    )


def judge_nccl(version: str | None, gpus: int) -> Finding:
    if version:
        return ok("nccl", f"{version} in this torch" + ("" if gpus else " (unused without a GPU)"))
    if gpus:
        return fail("nccl", "this torch is built without NCCL, which GPUs need", "install the CUDA build of torch")
    return ok("nccl", "not in this torch (needed on GPUs only)")


def judge_kubernetes(kubectl: str | None, kubeconfig: Path, in_pod: bool) -> Finding:
    """Information only: nothing here stops a local run."""
    config = "inside a pod" if in_pod else f"{kubeconfig} {'found' if kubeconfig.is_file() else 'absent'}"
    return ok("kubernetes", f"kubectl {'found at ' + kubectl if kubectl else 'absent'}, {config}")


def judge_wandb_mode(mode: str) -> Finding:
    known = ("online", "offline", "disabled", "shared", "dryrun", "run")
    if mode in known:
        return ok("wandb mode", mode)
    return warn("wandb mode", f"WANDB_MODE={mode} is none of {', '.join(known)}", "unset WANDB_MODE, use tracking=MODE")


def judge_wandb_key(mode: str, source: str | None) -> Finding:
    """`source`: where a key stands; the key itself never comes here."""
    if source:
        return ok("wandb key", f"configured in {source}")
    if mode == "online":
        return warn("wandb key", "none, and WANDB_MODE=online needs one", "wandb login, or tracking=offline")
    return ok("wandb key", "none (needed for tracking=online only)")


def judge_wandb_server(url: str, outcome: int | str) -> Finding:
    """`outcome`: an HTTP status, or why there was none."""
    if isinstance(outcome, int):
        return ok("wandb server", f"{url} answers with status {outcome}")
    way_out = "nothing to do for tracking=offline (the default); `wandb sync` uploads later"
    return warn("wandb server", f"{url} does not answer: {outcome}", way_out)


def judge_decoder(missing: str | None) -> Finding:
    """`missing` says why there is no compiled kernel."""
    if missing is None:
        return ok("image decoder", "compiled kernel")
    return warn(
        "image decoder",
        f"the compiled kernel is {missing}; simplejpeg and torch decode the same pixels, a fifth to a third slower, "
        "and `shards convert` cannot run",
        "install a C compiler (apt-get install gcc), then `make install`",
    )


def judge_git(path: str | None) -> Finding:
    if path:
        return ok("git", f"found at {path}")
    return warn("git", "absent: run.json cannot record the state of the code", "install git")
