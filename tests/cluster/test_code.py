"""The archive holds what a worker needs, the same bytes for the same files, and no secret."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from orchestrator.cluster import code
from orchestrator.cluster.code import Leak, archive_of, pack, scan
from orchestrator.errors import ConfigError

TRACKED = {
    "orchestrator/__init__.py": "X = 1\n",
    "orchestrator/data/decode.py": "import io\n",
    "orchestrator/data/native/kernel.c": "int x;\n",
    "jobs/train.py": "import sys\n",
    "conf/config.yaml": "seed: 0\n",
    "pyproject.toml": "[project]\n",
    "tests/test_x.py": "assert True\n",
    "docs/page.md": "# Page\n",
    "README.md": "# Read\n",
    "orchestrator/.env": "A=1\n",
    "orchestrator/server.pem": "x\n",
    "orchestrator/table.bin": "x" * (600 << 10),
}
SENT = [
    "conf/config.yaml", "jobs/train.py", "orchestrator/__init__.py", "orchestrator/data/decode.py",
    "orchestrator/data/native/kernel.c", "pyproject.toml",
]  # fmt: skip
TOKEN = "ghp_" + "c4n4ry" * 7


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, "-C", str(root), *arguments], check=True, capture_output=True)


def write(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    write(root, TRACKED)
    (root / "orchestrator" / "link.py").symlink_to("/etc/passwd")
    git(root, "init")
    git(root, "add", "-A")
    git(root, "commit", "-m", "all")
    write(root, {".env": f"T={TOKEN}", "data/x.tar": "x", "runs/r/run.json": "{}", ".netrc": f"password {TOKEN}"})
    return root


def members(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {m.name: (tar.extractfile(m) or io.BytesIO()).read() for m in tar.getmembers()}


def refusal(root: Path, *code_files: str) -> str:
    with pytest.raises(ConfigError) as caught:
        archive_of(code_files, root)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def test_what_a_worker_needs_is_sent_and_what_was_left_out_of_it_is_said(checkout: Path) -> None:
    archive = archive_of([], checkout)
    assert list(members(archive.content)) == SENT
    assert archive.files == len(SENT)
    assert sorted(archive.left_out) == [
        "orchestrator/.env", "orchestrator/link.py", "orchestrator/server.pem", "orchestrator/table.bin"
    ]  # fmt: skip


def test_the_same_files_give_the_same_bytes_whatever_their_times_modes_and_places(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = archive_of([], checkout)
    elsewhere = tmp_path / "elsewhere"
    subprocess.run(["git", "clone", "-q", str(checkout), str(elsewhere)], check=True)
    for path in sorted(elsewhere.rglob("*.py"), reverse=True):
        if not path.is_symlink():
            os.utime(path, (1, 1))
            path.chmod(0o700)
    monkeypatch.chdir(tmp_path)
    second = archive_of([], elsewhere)
    assert (second.content, second.digest) == (first.content, first.digest)
    write(elsewhere, {"jobs/train.py": "import os\n"})
    assert archive_of([], elsewhere).digest != first.digest


def test_order_and_members_do_not_depend_on_how_files_are_listed() -> None:
    files = [("b", b"2"), ("a/x", b"1"), ("a-x", b"3")]
    assert pack(files) == pack(list(reversed(files)))
    with tarfile.open(fileobj=io.BytesIO(pack(files))) as tar:
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar.getmembers()}
    assert facts == {(0, 0, 0, "", 0o644)}


def test_changes_that_are_not_committed_are_sent_and_said(checkout: Path) -> None:
    assert archive_of([], checkout).source.startswith("commit ")
    assert "changed" not in archive_of([], checkout).source
    write(checkout, {"jobs/train.py": "changed = 1\n"})
    (checkout / "conf" / "config.yaml").unlink()
    archive = archive_of([], checkout)
    assert archive.source.endswith("with 2 files changed since")
    assert members(archive.content)["jobs/train.py"] == b"changed = 1\n"
    assert "conf/config.yaml" not in members(archive.content)


def test_a_module_that_git_does_not_track_is_named_and_goes_along_when_it_is_listed(checkout: Path) -> None:
    write(checkout, {"orchestrator/mine.py": "Y = 2\n"})
    said = refusal(checkout)
    assert "orchestrator/mine.py would be missing there" in said
    assert "git add orchestrator/mine.py" in said
    assert "orchestrator/mine.py" in members(archive_of(["orchestrator/mine.py"], checkout).content)


def test_files_and_folders_that_are_listed_are_sent_whatever_their_size(checkout: Path) -> None:
    write(checkout, {"own/model.py": "Z = 3\n", "own/sub/x.txt": "x", "own/__pycache__/model.pyc": "x"})
    sent = members(archive_of(["own", "orchestrator/table.bin"], checkout).content)
    assert {"own/model.py", "own/sub/x.txt", "orchestrator/table.bin"} <= sent.keys()
    assert not [name for name in sent if name.endswith(".pyc")]


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        (".env", "holds .env, which is never sent"), (".git", "which is never sent"), (".netrc", "never sent"),
        ("own", "holds own/id_rsa, which is never sent"), ("data", "is data and no code"),
        ("runs/r", "is data and no code"), ("../other", "is no file or folder of"), ("/etc/passwd", "is no file"),
        ("absent", "is no file or folder of"), ("orchestrator/link.py", "is no file or folder of"),
    ],
)  # fmt: skip
def test_private_files_data_and_other_places_are_refused_by_name(checkout: Path, entry: str, rule: str) -> None:
    write(checkout, {"own/id_rsa": "x", "own/ok.py": "x"})
    write(checkout.parent, {"other/x.py": "x"})
    said = refusal(checkout, entry)
    assert said.startswith(f"cluster.code_files = {entry}: ")
    assert rule in said


PRIVATE = [
    ".env", ".env.local", "a/.env", ".git", "a/.git/config", ".netrc", "_netrc", "k/kubeconfig", "kubeconfig.yaml",
    ".aws/credentials", "x/.ssh/known_hosts", "id_rsa", "id_ed25519.pub", "a.pem", "B.KEY", "c.p12", "credentials.json",
    "service-account-prod.json", ".pypirc", ".git-credentials",
]  # fmt: skip


@pytest.mark.parametrize("path", PRIVATE)
def test_names_that_are_never_sent(path: str) -> None:
    assert code.PRIVATE.fullmatch(path)


@pytest.mark.parametrize("path", ["orchestrator/environment.py", "keys.py", "a/monkey.py", "gitignore", "data/key.py"])
def test_names_that_only_resemble_them(path: str) -> None:
    assert not code.PRIVATE.fullmatch(path)


def test_a_secret_is_refused_by_file_and_line_without_its_value(checkout: Path) -> None:
    write(checkout, {"jobs/train.py": f"import sys\nTOKEN = '{TOKEN}'\n"})
    said = refusal(checkout)
    assert "jobs/train.py:2 (token of GitHub)" in said
    assert "tracking.secret" in said


def test_a_line_says_that_it_holds_no_secret(checkout: Path) -> None:
    write(checkout, {"jobs/train.py": f"TOKEN = '{TOKEN}'  # not a secret: an example\n"})
    assert archive_of([], checkout).files == len(SENT)


def test_findings_are_data_of_place_and_kind() -> None:
    files = [("a", b"x\nkey = AKIAIOSFODNN7CANARY1\n"), ("b.bin", b"\0" + TOKEN.encode()), ("c", b"nothing here")]
    assert scan(files) == [Leak("a", 2, "key of AWS")]


def test_without_git_the_package_is_sent_as_it_is_installed(tmp_path: Path) -> None:
    write(tmp_path, {**TRACKED, "orchestrator/conf/config.yaml": "seed: 0\n", "jobs/__pycache__/x.pyc": "x",
                     "other_package/x.py": "x"})  # fmt: skip
    archive = archive_of([], tmp_path)
    names = list(members(archive.content))
    assert "orchestrator/conf/config.yaml" in names
    assert not {"other_package/x.py", "conf/config.yaml", "orchestrator/.env"} & set(names)
    assert archive.source == "of the installed package"


def test_git_that_cannot_list_the_checkout_is_named(tmp_path: Path) -> None:
    write(tmp_path, TRACKED)
    (tmp_path / ".git").mkdir()
    assert "cluster.code=image" in refusal(tmp_path)


def test_this_checkout_holds_no_secret_and_fits_into_an_object_of_kubernetes() -> None:
    root = Path(code.__file__).parents[2]
    paths = [path for path in code._tracked(root) if code.WANTED.fullmatch(path)]
    files = [(path, (root / path).read_bytes()) for path in paths]
    assert scan(files) == []
    assert len(pack(files)) < 900 << 10
