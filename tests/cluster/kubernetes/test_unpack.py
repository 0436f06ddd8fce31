"""The code in a pod: the archive that was sent, or nothing."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from profiles import pods_of, profile

from orchestrator.cluster.kubernetes.render import render
from orchestrator.options import JobKind


def archive(path: Path, *members: tuple[str, bytes]) -> str:
    """Write a code.tar.gz; returns its sha256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unpack(path: Path, digest: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """As the manifest says, with other places."""
    pod = next(pods_of(render(profile("archive_secrets_volumes"), JobKind.job)[-1]))
    _, *flags, where, sent, target = pod["spec"]["initContainers"][0]["command"]
    assert (where, sent, target) == ("/etc/orchestrator/archive/code.tar.gz", "a" * 64, "/opt/orchestrator/code")
    command = [sys.executable, *flags, str(path), digest, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={})


def test_the_archive_is_unpacked(tmp_path: Path):
    path, folder = tmp_path / "code.tar.gz", tmp_path / "code"
    digest = archive(path, ("orchestrator/a.py", b"x = 1\n"), ("jobs/b.py", b""))
    assert unpack(path, digest, folder).returncode == 0
    assert (folder / "orchestrator" / "a.py").read_text() == "x = 1\n"


def test_another_archive_is_refused_as_the_user_s_mistake_and_nothing_is_unpacked(tmp_path: Path):
    path, folder = tmp_path / "code.tar.gz", tmp_path / "code"
    archive(path, ("a.py", b""))
    done = unpack(path, "0" * 64, folder)
    assert done.returncode == 42
    assert "is not the one that was sent" in done.stderr
    assert "Traceback" not in done.stderr
    assert not folder.exists()


@pytest.mark.parametrize("name", ["../outside.py", "{root}/outside.py"])
def test_nothing_is_written_outside_of_the_folder(tmp_path: Path, name: str):
    path, folder = tmp_path / "code.tar.gz", tmp_path / "code"
    digest = archive(path, (name.format(root=tmp_path), b"x"))
    unpack(path, digest, folder)
    assert not (tmp_path / "outside.py").exists()
