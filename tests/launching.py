"""The command line as a user types it, in two forms, and the tiny data and the saboteur that real runs are tested with.

A cold command is a process of its own. Most of its seconds are imports, so a warm server answers the others: it runs
`orchestrator.cli.main.main` again and again, and its ranks are real processes that the forkserver forks in no time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[1]
SMALL = (
    "data=synthetic", "data.image_size=8", "data.padding=1", "data.num_workers=0", "model=cifar_resnet20",
    "recipe.epochs=2", "recipe.global_batch_size=16", "recipe.warmup_epochs=0", "compute=cpu2",
    "tracking=disabled", "tracking.log_every_steps=1",
)  # fmt: skip
SERVER = """
import json, os, sys
from orchestrator.cli.main import main
for line in sys.stdin:
    request = json.loads(line)
    os.chdir(request["cwd"])
    try:
        code = main(request["arguments"])
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(int(sys.argv[1]), f"{code}\\n".encode())
"""


@dataclass(frozen=True)
class Answer:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def last_line(self) -> str:
        return self.err.rstrip().splitlines()[-1]


def environment(sites: Sequence[Path]) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TORCHELASTIC_"))}
    path = os.pathsep.join(map(str, (REPO, *sites)))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


class WarmServer:
    """Runs commands one after the other in one process; stdout and stderr go to files that it and its ranks append."""

    def __init__(self, folder: Path, sites: Sequence[Path], prelude: str = ""):
        """`prelude`: code that the server runs first."""
        self._paths = [folder / "stdout", folder / "stderr"]
        files = [open(path, "ab") for path in self._paths]  # noqa: SIM115
        reading, writing = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", prelude + SERVER, str(writing)],
            stdin=subprocess.PIPE, stdout=files[0], stderr=files[1], pass_fds=[writing], text=True,
            env=environment(sites), start_new_session=True,
        )  # fmt: skip
        for file in files:
            file.close()
        os.close(writing)
        self._answers = os.fdopen(reading)
        self.pid = self._process.pid

    def run(self, arguments: Sequence[str], cwd: Path) -> Answer:
        starts = [path.stat().st_size for path in self._paths]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"arguments": list(arguments), "cwd": str(cwd)}) + "\n")
        self._process.stdin.flush()
        code = self._answers.readline().strip()
        texts = [path.read_bytes()[start:].decode() for path, start in zip(self._paths, starts, strict=True)]
        assert code, f"the server ended:\n{texts[1]}"
        return Answer(int(code), *texts)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._answers.close()


@dataclass(frozen=True)
class Cli:
    """Commands in `cwd`."""

    server: WarmServer
    cwd: Path
    sites: tuple[Path, ...]

    def __call__(self, *arguments: object) -> Answer:
        """Run on the warm server."""
        return self.server.run([str(argument) for argument in arguments], self.cwd)

    def start(self, *arguments: object, module: Sequence[str] = ("-m", "orchestrator.cli.main")) -> subprocess.Popen:
        """Start a process of its own in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, *module, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.cwd,
            env=environment(self.sites), start_new_session=True,
        )  # fmt: skip

    def cold(self, *arguments: object, module: Sequence[str] = ("-m", "orchestrator.cli.main")) -> Answer:
        """Run as a process of its own to the end."""
        return finish(self.start(*arguments, module=module))


def finish(process: subprocess.Popen, timeout_s: float = 120) -> Answer:
    out, err = process.communicate(timeout=timeout_s)
    return Answer(process.returncode, out, err)


class Saboteur:
    """Steers the test package's model: at a rank's n-th training batch of an attempt it does something once.

    Some hold until it is disarmed: with `white` and `nan`, images that are white in the middle or all of them become
    NaN, with `drift` the network depends on how many batches its process has seen.

    The model is a plain small network, so a run with it is the same run whether something is done or not.
    """

    def __init__(self, site: Path):
        self.site, self._order, self._done = site, site / "saboteur_order.json", site / "saboteur_done"

    def arm(self, do: str, rank: int, batch: int) -> None:
        """`do`: a signal that the rank sends to itself, `raise`, `sleep`, `flip` (a weight's bit), `gradient` (NaN)."""
        self._done.unlink(missing_ok=True)
        self._order.write_text(json.dumps({"do": do, "rank": rank, "batch": batch}))

    def disarm(self) -> None:
        self._order.unlink(missing_ok=True)

    @property
    def fired(self) -> bool:
        return self._done.exists()


SABOTEUR = '''
"""A test's own model: a small network that obeys one written order during training."""

import json, os, signal, time
from pathlib import Path
import torch
from torch import nn

ORDER = Path(__file__).with_name("saboteur_order.json")
DONE = Path(__file__).with_name("saboteur_done")


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, num_classes)
        self.batches = 0

    def forward(self, x):
        if self.training:
            self.batches += 1
            self.obey(x)
        return self.head(self.body(x).mean((2, 3)))

    def blank(self, x, what):
        """NaN in every image, or in those that are white in the middle; or what no checkpoint knows of."""
        if what == "drift":
            x *= 1 + 0.01 * self.batches
            return
        middle = x[:, :, 3:5, 3:5].amin((1, 2, 3))
        x[(middle > 0.99) | (what == "nan")] = float("nan")

    def obey(self, x):
        try:
            order = json.loads(ORDER.read_text())
        except FileNotFoundError:  # none, or another rank has just obeyed it
            return
        if order["do"] in ("white", "nan", "drift"):
            DONE.write_text(str(os.getpid()))
            self.blank(x, order["do"])
            return
        rank = int(os.environ.get("RANK", "0"))
        if (order["rank"], order["batch"]) != (rank, self.batches):
            return
        if order["do"] == "sleep":
            DONE.write_text(str(os.getpid()))
            while ORDER.exists():
                time.sleep(0.05)
            return
        ORDER.unlink()
        DONE.write_text(str(os.getpid()))
        if order["do"] == "flip":
            self.head.weight.data.view(torch.int32)[0, 0] ^= 1 << 20
            return
        if order["do"] == "gradient":
            hook = self.head.weight.register_hook(lambda gradient: (hook.remove(), gradient * float("nan"))[1])
            return
        if order["do"] == "raise":
            raise ArithmeticError("the saboteur struck")
        os.kill(os.getpid(), getattr(signal, order["do"]))


def build(num_classes):
    return Net(num_classes)
'''


def install_saboteur(site: Path) -> Saboteur:
    """A package with an entry point of `orchestrator.models`, as another project would ship it."""
    (site / "saboteur.py").write_text(SABOTEUR)
    info = site / "saboteur-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: saboteur\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[orchestrator.models]\nsaboteur = saboteur:build\n")
    return Saboteur(site)


def wait_for(condition: Any, what: str, timeout_s: float = 60) -> Any:
    """The first true value of `condition()`."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{timeout_s} s passed without {what}")


def group_members(group: int) -> dict[int, str]:
    """Living processes of a process group, by /proc: pid and command line."""
    members = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state not in "ZX":
                members[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):
            continue
    return members


def read_events(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    path = folder / "events" / f"rank_{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def saboteur_package(tmp_path_factory: pytest.TempPathFactory) -> Saboteur:
    return install_saboteur(tmp_path_factory.mktemp("site"))


@pytest.fixture
def saboteur(saboteur_package: Saboteur) -> Iterator[Saboteur]:
    yield saboteur_package
    saboteur_package.disarm()


@pytest.fixture(scope="session")
def warm_server(tmp_path_factory: pytest.TempPathFactory, saboteur_package: Saboteur) -> Iterator[WarmServer]:
    server = WarmServer(tmp_path_factory.mktemp("server"), [saboteur_package.site])
    yield server
    server.close()


@pytest.fixture
def cli(warm_server: WarmServer, saboteur_package: Saboteur, tmp_path: Path) -> Cli:
    """Commands in a folder of this test's own."""
    return Cli(warm_server, tmp_path, (saboteur_package.site,))


@pytest.fixture(scope="session")
def session_cli(warm_server: WarmServer, saboteur_package: Saboteur, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Commands in a folder that the whole session shares."""
    return Cli(warm_server, tmp_path_factory.mktemp("cwd"), (saboteur_package.site,))


@pytest.fixture(scope="session")
def shards(session_cli: Cli) -> Path:
    """144 synthetic images of 8 pixels in 4 classes: train/ (in uneven shards) and val/."""
    out = session_cli.cwd / "shards"
    made = session_cli(
        "shards", "make", "synthetic", out, "--samples", 144, "--classes", 4, "--size", 8, "--samples-per-shard", 40,
        "--val-fraction", 0.25, "--workers", 1,
    )  # fmt: skip
    assert made.code == 0, made.err
    return out


@pytest.fixture(scope="session")
def small(shards: Path) -> tuple[str, ...]:
    """Overrides of a two-process run of seconds: 108 images, 7 steps an epoch."""
    return (*SMALL, f"data.train={shards}/train", f"data.val={shards}/val")


@dataclass(frozen=True)
class Run:
    """A finished run: its answer (of `--json`), folder and result."""

    answer: Answer
    folder: Path
    result: dict[str, Any]


@pytest.fixture(scope="session")
def trained(session_cli: Cli, small: tuple[str, ...]) -> Run:
    """An undisturbed run of the small ResNet with momentum and a moving average."""
    answer = session_cli("train", *small, "recipe.ema_decay=0.9", "--json")
    assert answer.code == 0, answer.err
    result = answer.json()
    return Run(answer, session_cli.cwd / "runs" / result["run_id"], result)
