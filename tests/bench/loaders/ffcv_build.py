"""FFCV has no wheels and wants the headers of OpenCV and libturbojpeg: Debian's packages, unpacked, not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FFCV = "ffcv==1.0.2"
NEEDS = (
    "numba==0.68.1", "llvmlite==0.50.0", "opencv-python-headless==5.0.0.93", "terminaltables==3.1.10",
    "assertpy==1.1", "fastargs==1.2.0",
)  # fmt: skip
DEBIAN = (
    "libopencv-core-dev", "libopencv-imgproc-dev", "libopencv-core406", "libopencv-imgproc406", "libturbojpeg0-dev",
    "libturbojpeg0", "libtbb12", "liblapack3", "libblas3", "libgfortran5",
)  # fmt: skip
MODULES = ("core", "imgproc")
"""Of OpenCV: those that FFCV uses."""


def build(folder: Path, python: Path) -> str | None:
    """Install FFCV for `python`, its libraries below `folder`; returns why it cannot be built, or None."""
    if _run([python, "-c", "import ffcv.loader"]) is None:
        return None
    try:
        environment = _libraries(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no OpenCV and libturbojpeg for FFCV ({error})"
    install = [Path(sys.executable).parent / "uv", "pip", "install", "--quiet", "--python", python, "--no-deps"]
    # not a wheel of an earlier build: it finds its libraries in the folder that it was built for
    built = [*install, "--no-cache", "--reinstall", "--no-build-isolation", FFCV]
    return _run([*install, *NEEDS]) or _run(built, environment) or _run([python, "-c", "import ffcv.loader"])


def _libraries(folder: Path) -> dict[str, str]:
    """What the build must see: the system's packages where they are installed, else unpacked ones."""
    if _run(["pkg-config", "--exists", "opencv4", "libturbojpeg"]) is None:
        return {}
    debs = folder / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *DEBIAN], cwd=debs, check=True, capture_output=True)
    for deb in debs.glob("*.deb"):
        subprocess.run(["dpkg", "-x", deb, folder], check=True)
    include, library = folder / "usr" / "include", next(folder.glob("usr/lib/*-linux-gnu"))
    for nested in (*library.glob("lapack/*"), *library.glob("blas/*")):
        nested.replace(library / nested.name)
    defines = "".join(f"#define HAVE_OPENCV_{module.upper()}\n" for module in MODULES)
    (include / "opencv4" / "opencv2" / "opencv_modules.hpp").write_text(defines)
    names = " ".join(f"-lopencv_{module}" for module in MODULES)
    _describe(folder, "opencv4", f"-L{library} {names}", f"-I{include}/opencv4")
    _describe(folder, "libturbojpeg", f"-L{library} -lturbojpeg", f"-I{include}")
    linking = f"-Wl,-rpath,{library} -Wl,-rpath-link,{library} -Wl,--disable-new-dtags"
    return {"PKG_CONFIG_PATH": str(folder), "LDFLAGS": linking}


def _describe(folder: Path, name: str, libraries: str, flags: str) -> None:
    text = f"Name: {name}\nDescription: {name}\nVersion: 0\nLibs: {libraries}\nCflags: {flags}\n"
    (folder / f"{name}.pc").write_text(text)


def _run(command: list[str | Path], environment: dict[str, str] | None = None) -> str | None:
    """None where a command ends well, else what it says of its failure."""
    try:
        done = subprocess.run(
            command, env=os.environ | (environment or {}), capture_output=True, text=True, check=False
        )
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if "rror" in line or "not found" in line]
    return (lines or [f"ended with {done.returncode}"])[0][:200]
