"""Whole files or none, and a disk's troubles by their own names and exit codes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import EXIT_NODE, EXIT_USER, NodeError, UserError
from orchestrator.files import disk_errors, read_json, remove_halves, write_atomic, write_json

ROOT = Path(__file__).parents[1]
LIMITED = """
import resource, sys
from pathlib import Path
from orchestrator.files import write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_json(Path(sys.argv[1]), {"new": "x" * 10000})
except OSError as error:
    print(error.errno)
"""


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Permissions bind: root becomes nobody for the length of the test."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_what_is_written_is_read_back_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.json"
    for value in ({"ü": [1, 2.5, None]}, {"second": True}):
        write_json(path, value)
        assert read_json(path) == value
    assert "ü" not in path.read_text()
    assert os.listdir(path.parent) == ["x.json"]


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    done = subprocess.run([sys.executable, "-c", LIMITED, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) == errno.EFBIG
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_full_disk_is_an_unfit_node() -> None:
    with pytest.raises(NodeError, match=r"disk full.*Way out") as caught, disk_errors(Path("/runs/x")):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    assert caught.value.exit_code == EXIT_NODE
    assert "/runs/x" in str(caught.value)


@pytest.mark.parametrize(("number", "kind", "code"), [
    (errno.ENOSPC, NodeError, EXIT_NODE), (errno.EDQUOT, NodeError, EXIT_NODE), (errno.EACCES, UserError, EXIT_USER),
    (errno.EPERM, UserError, EXIT_USER), (errno.EROFS, UserError, EXIT_USER), (errno.ENOTDIR, UserError, EXIT_USER),
    (errno.EISDIR, UserError, EXIT_USER), (errno.ENAMETOOLONG, UserError, EXIT_USER),
])  # fmt: skip
def test_errors_of_the_disk_have_names_and_codes(number: int, kind: type[UserError | NodeError], code: int) -> None:
    with pytest.raises(kind, match=r"/runs/x: .*Way out") as caught, disk_errors(Path("/runs/x")):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == code


def test_any_other_error_stays_what_it_is() -> None:
    with pytest.raises(OSError, match="Input/output") as caught, disk_errors(Path("/runs/x")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert caught.value.errno == errno.EIO


def test_a_folder_without_permission_is_the_users_mistake(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    request.getfixturevalue("unprivileged")
    for path in (closed / "x.json", closed / "sub" / "x.json"):
        with pytest.raises(UserError, match="Permission denied"):
            write_atomic(path, b"x")


def test_a_path_through_or_onto_something_else_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file/x", tmp_path / "file/sub/x", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(UserError, match=r"cannot be written.*Way out"):
            write_atomic(path, b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "says"), [(None, "does not exist"), (b"{", "JSON"), (b"", "JSON"), (b"\xff", "JSON")]
)
def test_an_unreadable_json_is_the_users_mistake(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{says}.*Way out"):
        read_json(path)


def test_halves_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".result.json.17.tmp", "result.json", ".hidden", "notes.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".folder.tmp").mkdir()
    remove_halves(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".folder.tmp", ".hidden", "notes.tmp", "result.json"]
