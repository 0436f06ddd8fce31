"""`make gpu-check`: the path without a GPU, the isolation of checks, every check's code on the CPU at small sizes."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs import gpu_check as job
from orchestrator import gpu_agreement, gpu_bench, gpu_check, gpu_memory
from orchestrator.gpu_check import Check, CheckFailed, Setting

ROOT = Path(__file__).resolve().parent.parent
SMALL = Setting(
    device="cpu", arch="resnet18", image_size=64, agree_batch=4, batch=2, measure_s=0.05, compile_backend="eager"
)
CHECKS_OF_TESTS = """
import os, time
def figures(setting, **options): return {"device": setting.device, "bad": float("nan"), "third": 1 / 3, **options}
def wrong(setting):
    from orchestrator.gpu_check import CheckFailed
    raise CheckFailed("not equal", {"error": 0.5})
def broken(setting): raise KeyError("surprise")
def crash(setting):
    print("last words", flush=True)
    os._exit(9)
def hang(setting, pid_file):
    import subprocess
    child = subprocess.Popen(["sleep", "60"])
    open(pid_file, "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(60)
"""

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(autouse=True)
def one_thread():
    """Compute threads that wait for each other's core make these small steps many times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "checks_of_tests.py").write_text(CHECKS_OF_TESTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "checks_of_tests:"


@pytest.fixture
def arithmetic():
    """The checks leave torch's global switches as they set them; other tests must not see that."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
        yield
    gpu_bench.set_arithmetic()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@needs_no_gpu
def test_without_a_gpu_the_job_says_so_and_ends_with_0(tmp_path):
    out = tmp_path / "new" / "figures.json"
    call = [sys.executable, "-m", "jobs.gpu_check", "--json", str(out)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "No GPU on this machine: nothing was checked.\n"
    assert json.loads(out.read_text()) == {"gpu": None, "checks": []}
    assert list(out.parent.iterdir()) == [out]


def test_a_gpu_that_torch_cannot_use_ends_with_44(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: "/dev/nvidia0 is there, but torch cannot use it")
    assert job.main(["--json", str(tmp_path / "out.json")]) == 44
    assert "/dev/nvidia0 is there" in capsys.readouterr().err


def test_figures_that_cannot_be_written_end_with_42_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: pytest.fail("came to the checks"))
    assert job.main(["--json", str(tmp_path)]) == 42
    assert "Way out: --json PATH" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--only", "nothing"], ["--minutes", "0"], ["--minutes", "nan"]])
def test_arguments_that_check_nothing_end_with_42(args, capsys):
    with pytest.raises(SystemExit) as caught:
        job.main(args)
    assert caught.value.code == 42
    assert "Way out" in capsys.readouterr().err


def test_only_takes_the_checks_whose_name_starts_so():
    names = [check.name for check in job.parse(["--only", "step_time/bf16/"]).checks]
    assert names == ["step_time/bf16/64", "step_time/bf16/128", "step_time/bf16/256"]


def test_every_line_of_the_registry_names_a_function_that_takes_its_options():
    names = [check.name for check in gpu_check.CHECKS]
    assert len(set(names)) == len(names) == 28
    for check in gpu_check.CHECKS:
        module, _, function = check.target.partition(":")
        call = getattr({one.__name__: one for one in (gpu_bench, gpu_agreement, gpu_memory)}[module], function)
        inspect.signature(call).bind(Setting(), **check.options)


def test_a_check_in_its_own_process_returns_its_figures(targets):
    result = gpu_check.run_check(Check(name="a", target=targets + "figures", options={"n": 2}), SMALL, 30)
    assert (result.ok, result.error) == (True, None)
    assert result.figures == {"device": "cpu", "bad": None, "third": 0.33333, "n": 2}


FAILURES = [
    ("wrong", "not equal", {"error": 0.5}),
    ("broken", "KeyError: 'surprise'", {}),
    ("crash", "exit code 9: last words", {}),
    ("absent", "AttributeError", {}),
]


@pytest.mark.parametrize(("function", "text", "figures"), FAILURES)
def test_a_check_that_fails_in_any_way_is_one_failed_line(targets, function, text, figures):
    result = gpu_check.run_check(Check(name="a", target=targets + function), SMALL, 30)
    assert (result.ok, result.figures) == (False, figures)
    assert text in str(result.error)


def test_a_check_over_its_limit_is_killed_with_all_that_it_started(targets, tmp_path):
    file = tmp_path / "pids"
    check = Check(name="a", target=targets + "hang", options={"pid_file": str(file)})
    result = gpu_check.run_check(check, SMALL, 1.5)
    assert "killed after its limit" in str(result.error)
    assert result.seconds < 10
    time.sleep(0.1)
    for pid in file.read_text().split():
        status = Path(f"/proc/{pid}/stat")
        assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_checks_after_the_last_minute_fail_without_being_run(targets):
    checks = [Check(name=name, target=targets + "figures") for name in "ab"]
    results = list(gpu_check.run_all(checks, SMALL, minutes=0.0001))
    assert [(r.name, r.ok, r.seconds) for r in results] == [("a", False, 0.0), ("b", False, 0.0)]
    assert "were over" in str(results[0].error)


def test_the_job_prints_a_table_writes_json_and_ends_with_44_if_any_check_failed(targets, tmp_path, capsys):
    out = tmp_path / "out.json"
    good = Check(name="device", target=targets + "figures", options={"name": "H100"})
    assert job.run([good], SMALL, 1.0, out) == 0
    assert job.run([good, Check(name="odd", target=targets + "wrong")], SMALL, 1.0, out) == 44
    report = json.loads(out.read_text())
    assert report["gpu"]["name"] == "H100"
    assert [(c["name"], c["ok"], c["error"]) for c in report["checks"]] == [
        ("device", True, None),
        ("odd", False, "not equal"),
    ]
    assert list(report["checks"][0]) == ["name", "ok", "seconds", "figures", "error"]
    printed = capsys.readouterr().out
    assert "1 of 2 ok" in printed
    assert "odd: error 0.5" in printed


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_agrees_with_fp32_but_is_not_it(precision):
    figures = gpu_agreement.compare_precision(SMALL, precision=precision)
    assert 0 < figures["logits_error"] <= figures["logits_tolerance"]
    assert figures["gradient_cosine_least"] <= figures["gradient_cosine"] < 1


@pytest.mark.usefixtures("arithmetic")
def test_results_that_differ_raise_with_their_figures():
    batch = gpu_bench.make_batch(SMALL, 2)
    logits, gradient = gpu_agreement.forward_backward(SMALL, gpu_bench.build_model(SMALL), batch, "fp32")
    agree = gpu_agreement.require_agreement((logits, gradient), (logits, gradient), "fp32")
    assert agree["logits_error"] == 0
    assert agree["gradient_cosine"] == pytest.approx(1)
    for other in ((logits * 1.01, gradient), (logits, -gradient), (logits * math.nan, gradient)):
        with pytest.raises(CheckFailed) as caught:
            gpu_agreement.require_agreement((logits, gradient), other, "fp32")
        assert set(caught.value.figures) == set(agree)


@pytest.mark.usefixtures("arithmetic")
def test_a_gradient_that_overflows_is_scaled_down_before_it_counts(monkeypatch):
    scales = []

    class Wild(torch.amp.GradScaler):
        def __init__(self, device: str, enabled: bool):
            super().__init__(device, init_scale=2.0**127, enabled=enabled)

        def update(self, new_scale=None):
            scales.append(self.get_scale())
            super().update(new_scale)

    monkeypatch.setattr(torch.amp, "GradScaler", Wild)
    tiny = replace(SMALL, image_size=8)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 1000))
    batch = gpu_bench.make_batch(tiny, 2)
    _, gradient = gpu_agreement.forward_backward(tiny, model, batch, "bf16")
    assert scales == [1.0], "only fp16 is scaled"
    scales.clear()
    with pytest.raises(CheckFailed, match="no finite gradient"):
        gpu_agreement.forward_backward(tiny, model, batch, "fp16")
    assert scales == [2.0 ** (127 - n) for n in range(16)]
    assert bool(gradient.isfinite().all())


@pytest.mark.usefixtures("arithmetic")
def test_memory_layouts_agree_and_are_timed():
    figures = gpu_agreement.compare_channels_last(SMALL)
    assert figures["logits_error"] < 1e-4
    assert figures["speed_up"] == figures["contiguous_ms"] / figures["channels_last_ms"] > 0


@pytest.mark.usefixtures("arithmetic")
def test_the_channels_last_model_and_batch_really_have_that_layout():
    model = gpu_bench.build_model(SMALL, channels_last=True)
    images, _ = gpu_bench.make_batch(SMALL, 2, channels_last=True)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert next(model.parameters()).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("arithmetic")
def test_a_compiled_model_agrees_with_eager_and_is_timed():
    figures = gpu_agreement.compare_compiled(replace(SMALL, image_size=32, agree_batch=2))
    assert figures["logits_error"] < 1e-4
    assert figures["compile_s"] > 0
    assert figures["speed_up"] > 0


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_seeded_steps_leave_the_same_bits(precision):
    figures = gpu_agreement.repeat_steps(replace(SMALL, agree_batch=2), precision=precision)
    assert figures["first_sha256"] == figures["second_sha256"]


@pytest.mark.usefixtures("arithmetic")
def test_steps_with_other_bits_are_told(monkeypatch):
    digests = iter(("a", "b"))
    monkeypatch.setattr(gpu_agreement, "_digest_after_steps", lambda setting, precision: next(digests))
    with pytest.raises(CheckFailed, match="other bits"):
        gpu_agreement.repeat_steps(SMALL, precision="fp32")


def test_a_transfer_is_timed_and_its_bytes_compared():
    figures = gpu_bench.measure_transfer(SMALL)
    assert figures["batch_mb"] == 2 * 3 * 64 * 64 / 1e6
    assert figures["pageable_gb_per_s"] > 0


def test_a_group_of_one_rank_reduces_and_is_left():
    figures = gpu_bench.reduce_alone(SMALL)
    assert figures["backend"] == "gloo"
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("variant", gpu_check.VARIANTS)
def test_a_step_of_each_variant_is_timed(variant):
    tiny = replace(SMALL, arch="squeezenet1_1")
    figures = gpu_bench.measure_step(tiny, batch=2, **gpu_check.VARIANTS[variant])
    assert figures["images_per_s"] == pytest.approx(2000 / figures["step_ms"])
    assert 0 < figures["step_ms"] <= figures["step_p90_ms"]
    assert figures["steps"] >= 5
    assert figures["peak_gib"] is None


@pytest.mark.usefixtures("arithmetic")
def test_a_batch_that_does_not_fit_is_a_figure_unless_it_must(monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gpu_bench, "_measure", full)
    tiny = replace(SMALL, image_size=32)
    assert gpu_bench.measure_step(tiny, batch=2, precision="fp32") == {"batch": 2, "out_of_memory": True}
    with pytest.raises(CheckFailed, match="does not fit"):
        gpu_bench.measure_step(tiny, batch=2, precision="fp32", must_fit=True)


@pytest.mark.usefixtures("arithmetic")
def test_a_loss_that_is_not_finite_fails():
    with pytest.raises(CheckFailed, match="not finite"):
        gpu_bench._measure(SMALL, lambda: torch.tensor(math.nan), 2)


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu_every_check_is_ok(tmp_path):
    out = tmp_path / "out.json"
    assert job.main(["--json", str(out)]) == 0, out.read_text()


def test_batches_through_the_ring_arrive_whole_and_a_ring_without_spare_slots_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gpu_agreement.reuse_ring(SMALL, batches=9)["wrong"] == 0
    monkeypatch.setattr("orchestrator.data.ring.Ring.next_slot", lambda self: 0)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # keeps the view of the slot instead of a copy
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda tensor: LateExtremes(tensor))
    with pytest.raises(CheckFailed, match="overwritten"):
        gpu_agreement.reuse_ring(SMALL, batches=9)


class LateExtremes:
    """Extremes of a tensor as it is when they are looked at, like a copy that a GPU has yet to make."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def __getitem__(self, which: int) -> torch.Tensor:
        return self.tensor.max() if which else self.tensor.min()
