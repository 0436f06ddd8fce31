"""`make gpu-check`: run each check of one GPU in a process of its own, under a time limit, and gather figures as JSON.

To add a check, write a function ``f(setting, **options) -> figures`` as in `gpu_bench` and `gpu_agreement`, and a line
in `CHECKS`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.probes import PACKAGE_ROOT

BENCH = "orchestrator.gpu_bench:"
AGREEMENT = "orchestrator.gpu_agreement:"
MEMORY = "orchestrator.gpu_memory:"
BATCHES = (64, 128, 256)
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "tf32": {"precision": "tf32"},
    "bf16": {"precision": "bf16"},
    "bf16_channels_last": {"precision": "bf16", "channels_last": True},
    "bf16_channels_last_compile": {"precision": "bf16", "channels_last": True, "compiled": True},
}


class CheckFailed(Exception):
    """A check came to an end and its result is wrong; `figures` show how."""

    def __init__(self, message: str, figures: Mapping[str, Any]):
        super().__init__(message)
        self.figures = dict(figures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Device and sizes; the defaults are what `make gpu-check` measures, tests shrink them."""

    device: str = "cuda"
    arch: str = "resnet50"
    """A function of torchvision.models."""
    image_size: int = 224
    agree_batch: int = 32
    """Images in the checks that compare two ways of computing the same."""
    batch: int = 128
    """Images in a transfer, and in the speed of the memory layouts."""
    measure_s: float = 3.0
    """Time that a measurement aims at, after its warm-up."""
    compile_backend: str = "inductor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report: `target` is ``module:function``, called with a `Setting` and `options`."""

    name: str
    target: str
    limit_s: float = 60.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What came of a check; `error` is None exactly when it is ok."""

    name: str
    ok: bool
    seconds: float
    figures: dict[str, Any]
    error: str | None


def _memory(name: str, rows: int, *overrides: str) -> Check:
    options = {"overrides": ("data=imagenet", *overrides), "rows": rows}
    return Check(name=f"memory/{name}", target=f"{MEMORY}compare_memory", limit_s=90.0, options=options)


def _step_time(variant: str, batch: int) -> Check:
    options = VARIANTS[variant] | {"batch": batch, "must_fit": batch == min(BATCHES)}
    limit_s = 150.0 if "compiled" in options else 60.0
    return Check(name=f"step_time/{variant}/{batch}", target=f"{BENCH}measure_step", limit_s=limit_s, options=options)


CHECKS: tuple[Check, ...] = (
    Check(name="device", target=f"{BENCH}describe_device"),
    Check(name="nccl", target=f"{BENCH}reduce_alone"),
    Check(name="transfer", target=f"{BENCH}measure_transfer"),
    Check(name="ring", target=f"{AGREEMENT}reuse_ring"),
    Check(name="amp_bf16", target=f"{AGREEMENT}compare_precision", options={"precision": "bf16"}),
    Check(name="amp_fp16", target=f"{AGREEMENT}compare_precision", options={"precision": "fp16"}),
    Check(name="channels_last", target=f"{AGREEMENT}compare_channels_last"),
    Check(name="deterministic_fp32", target=f"{AGREEMENT}repeat_steps", options={"precision": "fp32"}),
    Check(name="deterministic_bf16", target=f"{AGREEMENT}repeat_steps", options={"precision": "bf16"}),
    Check(name="compile", target=f"{AGREEMENT}compare_compiled", limit_s=180.0),
    _memory("resnet50/64", 64, "model=resnet50"),
    _memory("resnet50_bf16/128", 128, "model=resnet50", "compute.precision=bf16"),
    _memory("resnet18_average/128", 128, "model=resnet18", "recipe.ema_decay=0.99"),
    *(_step_time(variant, batch) for variant in VARIANTS for batch in BATCHES),
)


def run_all(checks: Sequence[Check], setting: Setting, minutes: float) -> Iterator[CheckResult]:
    """Run the checks one after another; what does not start within `minutes` fails without being run."""
    deadline = time.monotonic() + 60 * minutes
    for check in checks:
        left = deadline - time.monotonic()
        if left < 1:
            yield failed(check, 0.0, f"not run: the {minutes:g} minutes were over")
        else:
            yield run_check(check, setting, min(check.limit_s, left))


def failed(check: Check, seconds: float, error: str, figures: Mapping[str, Any] | None = None) -> CheckResult:
    return CheckResult(name=check.name, ok=False, seconds=round(seconds, 2), figures=dict(figures or {}), error=error)


def run_check(check: Check, setting: Setting, limit_s: float) -> CheckResult:
    """Run one check in a fresh process, so that a crash, a hang or a spoilt device harms no other."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        answer, log = Path(folder, "answer.json"), Path(folder, "log")
        code = _run_child(check, setting, (answer, log), limit_s)
        seconds = time.monotonic() - started
        if code is None:
            return failed(check, seconds, f"killed after its limit of {limit_s:.0f} s")
        if not answer.is_file():
            tail = log.read_text(errors="replace").strip()[-600:]
            return failed(check, seconds, f"its process ended with exit code {code}: {tail}")
        told = json.loads(answer.read_text())
    if told["error"] is not None:
        return failed(check, seconds, told["error"], told["figures"])
    return CheckResult(name=check.name, ok=True, seconds=round(seconds, 2), figures=told["figures"], error=None)


def _run_child(check: Check, setting: Setting, files: tuple[Path, Path], limit_s: float) -> int | None:
    """Exit code of the child, or None where it was killed for its time; it never outlives this call."""
    answer, log = files
    request = json.dumps({"target": check.target, "options": check.options, "setting": asdict(setting)})
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")])),
        # Kernels cached by an earlier run would make compiling look free.
        "TORCHINDUCTOR_CACHE_DIR": str(answer.with_name("inductor")),
        "TRITON_CACHE_DIR": str(answer.with_name("triton")),
    }
    command = [sys.executable, "-m", "orchestrator.gpu_check", request, str(answer)]
    with log.open("wb") as sink:
        child = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True, env=environment)
        try:
            return child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(child)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it started, such as compiler processes."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def answer_request(request: str, answer: Path) -> None:
    """The child's side: call the function and write ``{figures, error}``."""
    asked = json.loads(request)
    module, _, function = asked["target"].partition(":")
    figures: Mapping[str, Any] = {}
    error = None
    try:
        call = getattr(importlib.import_module(module), function)
        figures = call(Setting(**asked["setting"]), **asked["options"])
    except Exception as caught:
        figures = getattr(caught, "figures", {})
        error = str(caught) if hasattr(caught, "figures") else f"{type(caught).__name__}: {caught}"
    unfinished = answer.with_suffix(".part")
    unfinished.write_text(json.dumps({"figures": round_figures(figures), "error": error}))
    unfinished.replace(answer)


def round_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Floats to five significant digits; what JSON has no word for becomes null."""

    def rounded(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return float(f"{value:.5g}") if abs(value) < float("inf") else None

    return {name: rounded(value) for name, value in figures.items()}


def to_report(results: Sequence[CheckResult]) -> dict[str, Any]:
    """The whole JSON; `gpu` are the figures of the check `device`."""
    device = next((result.figures for result in results if result.name == "device"), {})
    return {"gpu": device, "checks": [asdict(result) for result in results]}


NO_GPU: dict[str, Any] = {"gpu": None, "checks": []}


def find_gpu() -> str | None:
    """None without a GPU, `usable` if torch can use one, else what is in the way."""
    import torch

    if torch.cuda.is_available():
        return "usable"
    present = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if not present or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    return f"{present[0]} is there, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it"


if __name__ == "__main__":
    # CheckFailed must be the class that the checks raise, not a second one of the module __main__.
    importlib.import_module("orchestrator.gpu_check").answer_request(sys.argv[1], Path(sys.argv[2]))
