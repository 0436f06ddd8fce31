"""Compile the kernel with the C compiler of this machine, or with the one that a wheel brings; runs at installation.

It needs only the standard library.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("kernel.c", "cpu.h", "huffman.h", "jpeg_file.h", "libjpeg.h", "resize.h")
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # libjpeg's structures are reached by offset
    "-Wall",
    "-Wextra",
)

# A C compiler from PyPI, for machines that have none: fetched into the build's own environment, gone afterwards.
COMPILER_WHEEL = "ziglang>=0.13,<0.18"
COMPILER_WHEEL_FOR = ("x86_64", "aarch64")


def kernel_path() -> Path:
    """Where the kernel of these very sources lies, built or not: an older one is never taken for it."""
    digest = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in SOURCES) + " ".join(FLAGS).encode())
    return HERE / f"kernel-{digest.hexdigest()[:12]}.so"


def build_needs() -> list[str]:
    """What must be installed from PyPI before the kernel can be built on this machine."""
    if kernel_path().exists() or _system_compiler() or sys.platform != "linux":
        return []
    return [COMPILER_WHEEL] if platform.machine() in COMPILER_WHEEL_FOR else []


def _system_compiler() -> list[str]:
    named = os.environ.get("CC")
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return shlex.split(named) if named else [found] if found else []


def _wheels_compiler() -> list[str]:
    # -s: zig keeps debugging symbols, twenty times the kernel
    return [sys.executable, "-m", "ziglang", "cc", "-s"] if importlib.util.find_spec("ziglang") else []


def build_kernel() -> str | None:
    """Build the kernel if it is not there; returns why it cannot be, or None."""
    target = kernel_path()
    if target.exists():
        return None
    compiler = _system_compiler() or _wheels_compiler()
    if not compiler:
        return "no C compiler (cc, gcc or clang on the path, or the wheel ziglang)"
    if sys.platform != "linux":
        return f"written for Linux, this is {sys.platform}"
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        made = Path(folder) / target.name
        command = [*compiler, *FLAGS, "-o", str(made), str(HERE / SOURCES[0]), "-ldl", "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{shlex.join(compiler)} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        for old in HERE.glob("kernel-*.so"):
            old.unlink()
        made.replace(target)
    return None


if __name__ == "__main__":
    reason = build_kernel()
    print(f"kernel: {kernel_path().name}" if reason is None else f"kernel not built: {reason}")
