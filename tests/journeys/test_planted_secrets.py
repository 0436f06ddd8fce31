"""Twelve secrets, one in each channel through which one could leak: none is in anything that a run leaves behind."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from launching import REPO, Answer, environment

from orchestrator.cli.main import main

MARK, HEX_MARK = "c4n4ry", "ca4a41"
PLANTED = {
    "env": HEX_MARK * 6 + "0123",
    "argv": f"{MARK}01Qw7Zx9Lp3Kd8Vb2N",
    "override": f"ghp_{MARK}02Qw7Zx9Lp3Kd8Vb2NQw7Zx9Lp3Kd8",
    "yaml": f"hf_{MARK}03Qw7Zx9Lp3Kd8Vb2NQw7Zx9",
    "address": f"{MARK}04-word",
    "header": f"{MARK}05Qw7Zx9",
    "git remote": f"{MARK}06-word",
    ".env": f"{MARK}07Qw7Zx9Lp3Kd8Vb2N",
    "W&B config": f"{MARK}08Qw7Zx9Lp3Kd8Vb2N",
    "exception": f"{MARK}09Qw7Zx9Lp3Kd8Vb2N",
    "runtime_env": f"{MARK}10Qw7Zx9Lp3Kd8Vb2N",
    "annotation": f"AKIA{MARK.upper()}11QW7ZX9AB",
}
LEAKY = f"""
import logging, os, time
from pathlib import Path
from torch import nn

def wait_for_mirror():
    until = time.monotonic() + 30
    while not list(Path("runs").glob("*/wandb/*/*.wandb")) and time.monotonic() < until:
        time.sleep(0.05)

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body, self.batches = nn.Linear(8 * 8 * 3, num_classes), 0

    def forward(self, x):
        self.batches += 1
        if self.training and self.batches > 2:
            wait_for_mirror()
            said = "GET https://me:{PLANTED["exception"]}@store/x: token={PLANTED["exception"]}, "
            said += os.environ["STORE_PASSWORD"]
            logging.getLogger("leaky").warning(said)
            print("printed", said)
            raise RuntimeError(said)
        return self.body(x.flatten(1))

def build(num_classes):
    return Net(num_classes)
"""
MIRROR = f"""
from pathlib import Path
from orchestrator.config import TrackingConfig
from orchestrator.options import TrackingMode
from orchestrator.track.wandb import start
config = TrackingConfig(mode=TrackingMode.offline, entity=None, project="p", group=None, tags=[], log_every_steps=1,
                        upload_checkpoint=False, init_timeout_s=5.0, secret=None)
secret = "{PLANTED["W&B config"]}"
Path("mirror").mkdir()
tracker = start(config, Path("mirror"), "mirrored", "name", {{"api_key": secret, "data": f"https://me:{{secret}}@host/x"}})
tracker.log({{"global_step": 1, "train/loss": 0.5}})
assert tracker.finish() is not None
"""


class Field:
    """A copy of the code as a checkout of its own, a folder to work in, and what was printed there."""

    def __init__(self, folder: Path):
        self.checkout, self.cwd, site = folder / "checkout", folder / "work", folder / "site"
        self.cwd.mkdir()
        for name in ("orchestrator", "jobs", "conf", "k8s"):
            shutil.copytree(REPO / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        git = ("git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(self.checkout))
        remote = f"https://me:{PLANTED['git remote']}@host/x.git"
        for arguments in (["init", "-q"], ["remote", "add", "origin", remote], ["add", "-A"], ["commit", "-qm", "all"]):
            subprocess.run([*git, *arguments], check=True, capture_output=True)
        for place in (self.checkout, self.checkout / "orchestrator"):
            (place / ".env").write_text(f"TOKEN={PLANTED['.env']}\n")
        (site / "leaky-1.0.dist-info").mkdir(parents=True)
        (site / "leaky.py").write_text(LEAKY)
        (site / "leaky-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: leaky\nVersion: 1.0\n")
        (site / "leaky-1.0.dist-info" / "entry_points.txt").write_text("[orchestrator.models]\nleaky = leaky:build\n")
        own = folder / "groups" / "tracking"
        own.mkdir(parents=True)
        (own / "mine.yaml").write_text(f"defaults: [defaults]\nmode: offline\nentity: {PLANTED['yaml']}\n")
        self.groups = own.parent
        secret = PLANTED["env"]
        paths = f"{self.checkout}:{site}"
        self.env = {**environment([]), "PYTHONPATH": paths, "WANDB_API_KEY": secret, "STORE_PASSWORD": secret,
                    "AWS_SECRET_ACCESS_KEY": secret, "HOME": str(folder)}  # fmt: skip
        self.printed = ""

    def __call__(self, *arguments: object, module: tuple[str, ...] = ("-m", "orchestrator.cli.main")) -> Answer:
        command = [sys.executable, *module, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.cwd, env=self.env, capture_output=True, text=True, timeout=120, check=False
        )
        self.printed += done.stdout + done.stderr
        return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Field:
    return Field(tmp_path_factory.mktemp("planted"))


def to_kubernetes(shards: Path) -> list[str]:
    volumes = f"[{{claim: runs, path: /runs, read_only: false}}, {{claim: data, path: {shards}, read_only: true}}]"
    return ["cluster=kubernetes", f"cluster.image=r/x@sha256:{'1' * 64}", "cluster.kind=job", "runs_dir=/runs",
            f"cluster.volumes={volumes}", "tracking.secret=wandb/api-key"]  # fmt: skip


def to_ray(shards: Path) -> list[str]:
    return ["cluster=ray", "runs_dir=/runs", "tracking.secret=/etc/wandb-key"]


def to_here(shards: Path) -> list[str]:
    return []


Place = Callable[[Path], list[str]]
WHERE: dict[str, Place] = {"kubernetes": to_kubernetes, "ray": to_ray, "local": to_here}


def hits(text: str) -> list[str]:
    return [channel for channel, secret in PLANTED.items() if secret in text]


def leaks_below(folder: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        found += [(str(path), channel) for channel, secret in PLANTED.items() if secret.encode() in content]
    return found


IN_CONFIG: dict[str, Callable[[Field], list[object]]] = {
    "override": lambda field: [f"tracking.group={PLANTED['override']}"],
    "yaml": lambda field: ["tracking=mine", "--config-dir", field.groups],
    "address": lambda field: [f"data.train=https://me:{PLANTED['address']}@host/a.tar"],
    "header": lambda field: [f"data.val='pipe:curl -H \"Authorization: Bearer {PLANTED['header']}\" https://host/a'"],
    "runtime_env": lambda field: [f"cluster.env=['HF_TOKEN={PLANTED['runtime_env']}']"],
    "annotation": lambda field: [f"cluster.node_selector=['team={PLANTED['annotation']}']"],
    "argv": lambda field: [f"--token={PLANTED['argv']}"],
}


@pytest.fixture(scope="module")
def train(small: tuple[str, ...]) -> list[str]:
    """The command of a run, but for its model and its tracking."""
    return ["train", *(text for text in small if not text.startswith(("tracking=", "model=")))]


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str]]:
    """The command line in this process, in an empty folder: exit code, and all that it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            sys.exit(main([str(argument) for argument in arguments]))
        return ended.value.code, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize("channel", IN_CONFIG)
@pytest.mark.parametrize("where", WHERE)
def test_a_secret_that_is_typed_or_configured_is_refused_and_not_repeated(
    field: Field, train: list[str], shards: Path, typed: Callable[..., tuple[object, str]], channel: str, where: str
) -> None:
    code, said = typed(*train, *WHERE[where](shards), *IN_CONFIG[channel](field))
    assert code == 42, said
    assert hits(said) == []
    assert ("unrecognized arguments: --token=..." if channel == "argv" else "(hidden)") in said
    assert not list(Path.cwd().iterdir())


@pytest.fixture(scope="module")
def failed(field: Field, train: list[str]) -> Path:
    """The folder of a run that failed with secrets in its exception and its log."""
    answer = field(*train, "model=timm", "model.name=leaky", "tracking=offline", "cluster.max_restarts=0")
    assert answer.code == 1, answer.err
    assert "RuntimeError: GET https://...@store/x" in answer.err
    return next((field.cwd / "runs").iterdir())


@pytest.mark.slow
def test_a_run_that_fails_leaves_its_cause_and_no_secret(field: Field, failed: Path) -> None:
    names = {path.name for path in failed.rglob("*")}
    assert {"report.html", "result.json", "rank_0.log", "rank_0.error.json", "run.json"} <= names
    assert any(name.endswith(".wandb") for name in names)
    assert "RuntimeError" in json.loads((failed / "result.json").read_text())["error"]
    for verb in ("status", "logs"):
        assert field(verb, failed.name).code == 0
    assert leaks_below(failed) == []


@pytest.mark.slow
def test_the_mirror_of_a_config_with_secrets_holds_none(field: Field) -> None:
    assert field(module=("-c", MIRROR)).code == 0, field.printed[-2000:]
    assert list((field.cwd / "mirror").rglob("*.wandb"))
    assert leaks_below(field.cwd / "mirror") == []


def members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            yield member.name, (tar.extractfile(member) or io.BytesIO()).read()


def test_what_is_sent_to_kubernetes_and_ray_holds_none(field: Field, train: list[str], shards: Path) -> None:
    shown = field(*train, "tracking=online", *to_kubernetes(shards), "--dry-run")
    assert shown.code == 0, shown.err
    objects = list(yaml.safe_load_all(shown.out))
    (code,) = [obj for obj in objects if "binaryData" in obj]
    sent = dict(members(base64.b64decode(code["binaryData"]["code.tar.gz"])))
    assert "orchestrator/cli/main.py" in sent
    assert not [name for name in sent if name.endswith(".env") or ".git" in name]
    assert [hits(content.decode(errors="replace")) for content in sent.values() if MARK.encode() in content] == []
    ray = field(*train, "tracking=online", *to_ray(shards), "--dry-run")
    assert ray.code == 0, ray.err
    assert hits(shown.out + ray.out) == []
    assert "secretName: wandb" in shown.out, "the secret is there by name"


def test_nothing_that_was_printed_and_nothing_that_lies_where_the_runs_are_holds_one(
    field: Field, failed: Path
) -> None:
    assert hits(field.printed) == []
    assert leaks_below(field.cwd) == []
    planted = {channel for _, channel in leaks_below(field.checkout)} | {c for _, c in leaks_below(field.groups)}
    assert planted == {"git remote", ".env", "yaml"}, "the search itself finds what is there"
