"""The code as an archive: what a worker needs of this checkout, byte for byte the same for the same files."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.redact import find_secrets

File = tuple[str, bytes]
"""Path in the archive, and content."""
WANTED = re.compile(r"(orchestrator|jobs|conf)/.*|pyproject\.toml")
"""Of what git tracks: tests, pages and benchmarks stay here."""
PRIVATE = re.compile(
    r"(.*/)?(\.env[^/]*|\.git|\.git/.*|[._]netrc|kubeconfig[^/]*|(\.aws|\.ssh|\.kube|\.docker|\.gnupg)/.*|id_(rsa|dsa|ecdsa|ed25519)[^/]*"
    r"|\.npmrc|\.pypirc|\.git-credentials|credentials(\.json)?|service[-_]account[^/]*\.json"
    r"|[^/]*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk))",
    re.IGNORECASE,
)
"""Never sent, whoever names it."""
BULK = re.compile(r"(data|runs|wandb|\.venv[^/]*)/.*")
COMPILED = re.compile(r"(.*/)?__pycache__/.*|.*\.(pyc|pyo|so)")
LARGEST_FILE = 512 << 10
"""Bytes of a tracked file beyond which it is no code; `cluster.code_files` may name it."""
MARK = "not a secret"
"""On a line that looks like one."""
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Leak:
    """A place that looks like a secret; what stands there is not kept."""

    path: str
    line: int
    kind: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} ({self.kind})"


@dataclass(frozen=True, slots=True)
class Archive:
    """What is sent, and what a person should know of it."""

    content: bytes
    """code.tar.gz"""
    digest: str
    """sha256 of `content`, its address."""
    files: int
    source: str
    """What it was made of, in words."""
    left_out: tuple[str, ...]
    largest: tuple[tuple[str, int], ...] = ()
    """The largest files and their bytes, unpacked."""

    def __str__(self) -> str:
        return f"{self.files} files, {len(self.content) / 1024:.0f} KiB, sha256 {self.digest[:12]}, {self.source}"


def scan(files: Iterable[File]) -> list[Leak]:
    """Where the files look as if they held a secret."""
    return [leak for path, content in files for leak in _scan_file(path, content)]


def pack(files: Iterable[File]) -> bytes:
    """The files as tar.gz: in the order of names, without times, owners or modes of this machine."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, content in sorted(files):
            member = tarfile.TarInfo(path)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    with gzip.GzipFile(filename="", mode="wb", fileobj=outer, compresslevel=9, mtime=0) as packed:
        packed.write(inner.getvalue())
    return outer.getvalue()


def archive_of(code_files: Sequence[str], root: Path | None = None) -> Archive:
    """The code of this checkout as it lies there, changes that are not committed included; of the installed package
    where there is no checkout.

    `code_files`: what is sent besides. Raises ConfigError for secrets and for what would be missed.
    """
    root = Path(__file__).parents[2] if root is None else root
    in_git = (root / ".git").exists()
    tracked = _tracked(root) if in_git else _installed(root)
    wanted = [path for path in tracked if WANTED.fullmatch(path) and not COMPILED.fullmatch(path)]
    named = _named(root, code_files)
    left_out = [path for path in wanted if path not in named and not _is_code(root, path)]
    paths = {*wanted, *named} - set(left_out)
    if in_git:
        _require_tracked(root, paths)
    files = [(path, (root / path).read_bytes()) for path in sorted(paths)]
    _require_clean(scan(files))
    content = pack(files)
    source = _source(root) if in_git else "of the installed package"
    largest = sorted(((path, len(text)) for path, text in files), key=lambda one: -one[1])[:SHOWN]
    return Archive(content, hashlib.sha256(content).hexdigest(), len(files), source, tuple(left_out), tuple(largest))


def _scan_file(path: str, content: bytes) -> Iterator[Leak]:
    if b"\0" in content[:8192]:
        return
    for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
        if MARK not in line:
            yield from (Leak(path, number, kind) for kind, _, _ in find_secrets(line))


def _require_clean(leaks: list[Leak]) -> None:
    if not leaks:
        return
    places = ", ".join(map(str, leaks[:SHOWN])) + (f" and {len(leaks) - SHOWN} more" if len(leaks) > SHOWN else "")
    way_out = (
        "take it out (tracking.secret and cluster.store_secret say where a secret is), "
        f"or write `{MARK}` on a line that holds none"
    )
    raise ConfigError("cluster.code", "archive", f"would send what looks like a secret: {places}", way_out)


def _is_code(root: Path, path: str) -> bool:
    file = root / path
    return not (PRIVATE.fullmatch(path) or file.is_symlink()) and file.stat().st_size <= LARGEST_FILE


def _tracked(root: Path) -> list[str]:
    """What git tracks and still lies there."""
    return [path for path in _git(root, "ls-files", "-z").split("\0") if path and (root / path).is_file()]


def _installed(root: Path) -> list[str]:
    folders = ["orchestrator", "jobs", *(["conf"] if not (root / "orchestrator" / "conf").is_dir() else [])]
    return [str(path.relative_to(root)) for folder in folders for path in (root / folder).rglob("*") if path.is_file()]


def _named(root: Path, code_files: Sequence[str]) -> set[str]:
    """The files that `cluster.code_files` names, folders unfolded."""
    found: set[str] = set()
    for entry in code_files:
        place = root / entry
        inside = place.resolve().is_relative_to(root.resolve()) and not Path(entry).is_absolute()
        _require(inside and place.exists(), entry, f"is no file or folder of {root}", "a path relative to it")
        files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
        names = {str(path.relative_to(root)) for path in files if path.resolve().is_relative_to(root.resolve())}
        private = sorted(name for name in names if PRIVATE.fullmatch(name))
        way_out = "name the files beside it; tracking.secret and cluster.store_secret say where secrets are"
        _require(not private, entry, f"holds {', '.join(private[:SHOWN])}, which is never sent", way_out)
        bulk = any(BULK.fullmatch(name) for name in names)
        _require(not bulk, entry, "is data and no code", "cluster.volumes, or an object store")
        found |= {name for name in names if not COMPILED.fullmatch(name)}
    return found


def _require(ok: bool, entry: str, rule: str, way_out: str) -> None:
    if not ok:
        raise ConfigError("cluster.code_files", entry, rule, way_out)


def _require_tracked(root: Path, paths: set[str]) -> None:
    """A module that git does not track would be missing there, and the code's digest another one."""
    others = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", "orchestrator", "jobs", "conf")
    missed = [path for path in others.split("\0") if path.endswith((".py", ".yaml")) and path not in paths]
    if missed:
        shown = ", ".join(missed[:SHOWN]) + (" ..." if len(missed) > SHOWN else "")
        rule = f"sends what git tracks, and {shown} would be missing there"
        raise ConfigError("cluster.code", "archive", rule, f"git add {missed[0]}, or cluster.code_files=[{missed[0]}]")


def _source(root: Path) -> str:
    commit = _git(root, "rev-parse", "--short=12", "HEAD", may_fail=True).strip()
    changed = [line for line in _git(root, "status", "--porcelain", "--untracked-files=no").splitlines() if line]
    dirty = f" with {len(changed)} files changed since" if changed else ""
    return f"commit {commit}{dirty}" if commit else "a checkout without a commit"


def _git(root: Path, *arguments: str, may_fail: bool = False) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, env=env, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError("cluster.code", "archive", f"needs git, and {error}", "cluster.code=image") from None
    if done.returncode and not may_fail:
        said = (done.stderr.strip() or f"git ended with {done.returncode}").splitlines()[0]
        raise ConfigError("cluster.code", "archive", f"cannot list {root} ({said})", "mend it, or cluster.code=image")
    return done.stdout if not done.returncode else ""
