"""W&B mirrors a run and never costs it time: the real client against a server that answers, hangs or throttles."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stand_in_wandb import StandInWandb

from orchestrator.config import TrackingConfig
from orchestrator.options import TrackingMode
from orchestrator.track import session
from orchestrator.track import wandb as mirror

RUN_ID = "quickstart-0123abcd"
SECRET = "hunter2"
STEPS = list(range(10, 210, 10))
BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No account of the person who runs the tests is touched, and no run is waited for longer than 3 s."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(session, "UPLOAD_TIMEOUT_S", 3.0)
    monkeypatch.setattr(mirror, "ARTIFACT_TIMEOUT_S", 2.0)
    yield
    session.end_service()


def config(mode: str, init_timeout_s: float = 2.0, secret: str | None = None) -> TrackingConfig:
    return TrackingConfig(mode=TrackingMode(mode), entity=None, project="orchestrator", group="g", tags=["t"],
                          log_every_steps=10, upload_checkpoint=True, init_timeout_s=init_timeout_s,
                          secret=secret)  # fmt: skip


def run_config() -> dict[str, Any]:
    return {"optimizer": {"lr": 0.02}, "data": {"train": f"https://me:{SECRET}@host/a.tar?sig={SECRET}"}}


def mirror_a_run(
    folder: Path, tracking: TrackingConfig, timeout_s: float = mirror.FINISH_TIMEOUT_S
) -> tuple[mirror.Tracker, str | None, list[float]]:
    """Log what a short run logs; returns the tracker, what `finish` said, and the seconds of each `log`."""
    folder.mkdir(exist_ok=True)
    data = {"train": {"location": f"s3://me:{SECRET}@bucket/train", "digest": "d" * 64, "num_samples": 1437}}
    (folder / "run.json").write_text(json.dumps({"data": data}))
    tracker = mirror.start(tracking, folder, RUN_ID, "quickstart", run_config())
    seconds = [timed(lambda step=step: tracker.log({"global_step": step, "train/loss": 1 / step})) for step in STEPS]
    tracker.log({"global_step": 200, "val/acc1": {"hits": 9, "count": 10, "value": 0.9}, "gpu_gib": None})
    checkpoint = folder / "checkpoints" / "step_00000200"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    tracker.log_checkpoint(checkpoint, ["last"], {"step": 200})
    (checkpoint / "model.safetensors").unlink()
    tracker.log_confusion([[3, 1], [0, 4]], ["cat", "dog"])
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    tracker.log_images("val/worst", [folder / "x.png"], ["cat taken for dog"])
    tracker.summary({"val/acc1": {"hits": 9, "count": 10, "value": 0.9}})
    return tracker, tracker.finish(timeout_s), seconds


def timed(action: Any) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def p95(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.95 * len(seconds))]


def wandb_folders(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "wandb").iterdir() if "run-" in p.name)


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of an offline run as W&B's own reader prints them."""
    file = next(folder.glob("*.wandb"))
    lines = subprocess.run(
        [BIN / "wandb", "leet", "inspect", "--json", file], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in lines.stdout.splitlines()]


def logged_steps(rows: list[dict[str, Any]]) -> list[int]:
    return [int(row["global_step"]) for row in rows if "train/loss" in row]


def offline_steps(folder: Path) -> list[int]:
    return logged_steps([r["history"]["item"] for r in records(folder) if r["type"] == "history"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)


def test_an_offline_run_holds_every_step_once_with_config_summary_and_artifacts(tmp_path: Path):
    tracker, advice, seconds = mirror_a_run(tmp_path / "run", config("offline"))
    (folder,) = wandb_folders(tmp_path / "run")
    assert tracker.folder == folder
    assert tracker.url is None
    assert advice == f"wandb sync {folder}"
    assert p95(seconds) < 0.005
    found = records(folder)
    assert logged_steps([r["history"]["item"] for r in found if r["type"] == "history"]) == STEPS
    (run,) = [r["run"] for r in found if r["type"] == "run"]
    assert (run["run_id"], run["project"], run["display_name"]) == (RUN_ID, "orchestrator", "quickstart")
    assert run["config"]["update"]["optimizer"] == {"lr": 0.02}
    summaries = [r["summary"]["update"] for r in found if r["type"] == "summary"]
    assert any(s.get("val/acc1") == 0.9 for s in summaries)
    artifacts = {r["artifact"]["type"]: r["artifact"] for r in found if r["type"] == "artifact"}
    assert "last" in artifacts["model"]["aliases"]
    assert "d" * 64 in artifacts["dataset"]["metadata"]
    assert (tmp_path / "run/wandb/checkpoints/step_00000200/model.safetensors").read_bytes() == b"weights"
    assert list((folder / "files/media/images/val").glob("*.png"))


def test_nothing_about_machine_command_or_credentials_is_written(tmp_path: Path):
    mirror_a_run(tmp_path / "run", config("offline"))
    (folder,) = wandb_folders(tmp_path / "run")
    content = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".log")
    assert SECRET.encode() not in content
    assert sys.argv[0].encode() not in content
    assert not (folder / "files" / "requirements.txt").exists()
    assert not (folder / "files" / "wandb-metadata.json").exists()
    assert all("host" not in r["run"] for r in records(folder) if r["type"] == "run")


def test_each_attempt_adds_one_folder_under_the_same_run_id(tmp_path: Path):
    for _ in range(2):
        mirror_a_run(tmp_path / "run", config("offline"))
    folders = wandb_folders(tmp_path / "run")
    assert len(folders) == 2
    assert all(RUN_ID in folder.name for folder in folders)


def test_an_online_run_reaches_the_server_with_its_lineage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with StandInWandb() as server:
        point_at(monkeypatch, server.url)
        tracker, advice, seconds = mirror_a_run(tmp_path / "run", config("online", 20.0), timeout_s=30.0)
        assert advice is None
        assert tracker.url == f"{server.url}/stand-in/orchestrator/runs/{RUN_ID}"
        assert p95(seconds) < 0.005
        assert logged_steps(server.history) == STEPS
        dataset = 1 + [artifact["artifactTypeName"] for artifact in server.artifacts].index("dataset")
        assert json.loads(server.puts[f"/put/a{dataset}/shards.json"])["digest"] == "d" * 64
        assert [use["input"]["artifactID"] for use in server.used] == [f"a{dataset}"]
        assert b"weights" in server.puts.values()
        assert json.loads(server.puts["/put/wandb-summary.json"])["val/acc1"] == 0.9
        assert SECRET.encode() not in b"".join([*server.bodies, *server.puts.values()])
    assert not (tmp_path / "run/wandb/checkpoints").exists()


@pytest.mark.parametrize("behave", ["dead", "hang", "throttle"])
def test_a_server_that_never_takes_the_run_costs_one_warning(
    behave: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with StandInWandb(behave) as server:
        point_at(monkeypatch, f"http://127.0.0.1:{free_port()}" if behave == "dead" else server.url)
        begin = time.perf_counter()
        with caplog.at_level(logging.WARNING, "orchestrator"):
            tracker, advice, seconds = mirror_a_run(tmp_path / "run", config("online", 1.0), timeout_s=15.0)
        assert time.perf_counter() - begin < 15.0
    assert p95(seconds) < 0.005
    (warning,) = [r for r in caplog.records if r.name.startswith("orchestrator")]
    assert "goes on offline" in warning.getMessage()
    (folder,) = wandb_folders(tmp_path / "run")
    assert folder.name.startswith("offline-run-")
    assert advice == f"wandb sync {folder}"
    assert tracker.url is None
    assert offline_steps(folder) == STEPS


@pytest.mark.slow
def test_a_run_that_ends_before_the_server_answers_is_kept_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with StandInWandb("hang") as server:
        point_at(monkeypatch, server.url)
        begin = time.perf_counter()
        _, advice, _ = mirror_a_run(tmp_path / "run", config("online", 600.0))
        assert time.perf_counter() - begin < 15.0
    (folder,) = wandb_folders(tmp_path / "run")
    assert advice == f"wandb sync {folder}"
    assert offline_steps(folder) == STEPS


@pytest.mark.slow
def test_what_a_server_lost_can_be_synced_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with StandInWandb() as server:
        point_at(monkeypatch, server.url)
        folder = tmp_path / "run"
        folder.mkdir()
        tracker = mirror.start(config("online", 20.0), folder, RUN_ID, "quickstart", run_config())
        while tracker.url is None:
            time.sleep(0.05)
        server.behave = "hang"
        seconds = [timed(lambda s=step: tracker.log({"global_step": s, "train/loss": 0.1})) for step in STEPS]
        begin = time.perf_counter()
        advice = tracker.finish(timeout_s=12.0)
        assert time.perf_counter() - begin < 12.5
        assert p95(seconds) < 0.005
        assert server.history == []
    assert advice is not None
    assert advice == f"wandb sync --include-online {tracker.folder}"
    with StandInWandb() as server:
        point_at(monkeypatch, server.url)
        subprocess.run([BIN / "wandb", *advice.split()[1:]], check=True, capture_output=True, timeout=60)
        assert logged_steps(server.history) == STEPS


def test_the_key_comes_from_the_file_that_is_named_and_goes_into_no_variable_and_no_netrc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    key, file = "b" * 40, tmp_path / "key"
    file.write_text(f"{key}\n")
    file.chmod(0o600)
    with StandInWandb() as server:
        point_at(monkeypatch, server.url)
        tracker, advice, _ = mirror_a_run(tmp_path / "run", config("online", 20.0, secret=str(file)), timeout_s=30.0)
        assert (advice, tracker.url is not None) == (None, True)
        assert server.keys == {key}
    assert key not in os.environ.values()
    assert not list((tmp_path / "home").rglob(".netrc"))
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [content for content in written if key.encode() in content]


def test_a_key_that_everybody_may_read_is_not_used_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "key"
    file.write_text("b" * 40)
    file.chmod(0o644)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    mirror_a_run(tmp_path / "run", config("online", 5.0, secret=str(file)))
    assert f"chmod 600 {file}" in caplog.text
    assert "goes on offline" in caplog.text


def test_without_an_api_key_nobody_is_asked_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    mirror_a_run(tmp_path / "run", config("online", 5.0))
    assert "wandb login" in caplog.text
    (folder,) = wandb_folders(tmp_path / "run")
    assert offline_steps(folder) == STEPS


def test_disabled_tracking_never_imports_wandb(tmp_path: Path):
    script = """
import sys
from pathlib import Path
from orchestrator.config import TrackingConfig
from orchestrator.options import TrackingMode
from orchestrator.track.wandb import start
c = TrackingConfig(mode=TrackingMode.disabled, entity=None, project="p", group=None, tags=[], log_every_steps=1,
                   upload_checkpoint=True, init_timeout_s=1.0, secret=None)
t = start(c, Path("run"), "id", "name", {}, None)
t.log({"global_step": 1})
t.log_checkpoint(Path("x"), [], {})
assert t.finish() is None and t.url is None
assert not {"wandb", "torch", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_hanging_server_neither_delays_the_exit_nor_changes_its_code(tmp_path: Path):
    """Lightning's logger is replaced in the child: importing it takes longer than everything else here together."""
    script = f"""
import sys, time, types
class WandbLogger:
    def __init__(self, project, experiment): self.experiment = experiment
    def log_metrics(self, row): self.experiment.log(row)
sys.modules["pytorch_lightning"] = types.ModuleType("pytorch_lightning")
sys.modules["pytorch_lightning.loggers"] = types.SimpleNamespace(WandbLogger=WandbLogger)
from pathlib import Path
from orchestrator.config import TrackingConfig
from orchestrator.options import TrackingMode
from orchestrator.track.wandb import start
c = TrackingConfig(mode=TrackingMode.online, entity=None, project="p", group=None, tags=[], log_every_steps=1,
                   upload_checkpoint=True, init_timeout_s=1.0, secret=None)
t = start(c, Path("run"), "{RUN_ID}", "name", {{}}, None)
for i in range(100):
    t.log({{"global_step": i, "train/loss": 0.5}})
print(t.finish())
print(time.time(), flush=True)
sys.exit(3)
"""
    with StandInWandb("hang") as server:
        env = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
        child = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
        ended = time.time()
    advice, finished = child.stdout.splitlines()
    assert child.returncode == 3, child.stderr
    assert advice.startswith("wandb sync ")
    assert ended - float(finished) < 3.0
    assert "Traceback" not in child.stderr
