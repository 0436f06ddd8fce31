"""The environment of the peers, `.venv-peers` or $LOADERS_PEERS; it sees `.venv` behind its own packages."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.bench.loaders import ffcv_build
from tests.bench.loaders.sets import ROOT

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("LOADERS_PEERS") or ROOT / ".venv-peers").absolute()
PYTHON = FOLDER / "bin" / "python"
PINS = HERE / "peers.txt"


def install() -> dict[str, str]:
    """Make the environment where it is missing or older than its pins; returns package -> why it is not in it."""
    done = FOLDER / ".installed"
    if not done.exists() or done.read_text() != PINS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", FOLDER], check=True)
        site = FOLDER / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        (site / "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        _pip("-r", str(PINS))
        done.write_text(PINS.read_text())
    reason = ffcv_build.build(FOLDER / "ffcv", PYTHON)
    return {"ffcv": reason} if reason else {}


def _pip(*arguments: str) -> None:
    uv = Path(sys.executable).parent / "uv"
    command = [str(uv), "pip", "install", "--quiet", "--python", str(PYTHON), "--no-deps", *arguments]
    subprocess.run(command, check=True, cwd=ROOT)
