"""What a rank prints by whatever means of Python is written at once, whole, and without secrets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from launching import REPO

from orchestrator.cluster.rank_logs import read_logs
from orchestrator.cluster.speaker import LogTail, Speaker

TOKEN = "hf_" + "c4n4ryQw7Zx9Lp3Kd8Vb2NQw7Zx9Lp3Kd8"
PEM = ["-----BEGIN PRIVATE KEY-----", "c4n4ryMIIEvQIBADANBgkqhkiG9w0BAQEFAASC", "-----END PRIVATE KEY-----"]
BEGUN = """
import logging, os, sys, threading, warnings
from orchestrator.redact import remember
from orchestrator.train.printed import redact_output
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1), os.dup2(log, 2)
redact_output()
logging.basicConfig()
"""
OUTPUT = {
    "print": "print('key', TOKEN)",
    "print in pieces": "print('key ' + TOKEN[:9], TOKEN[9:], sep='')",
    "an open line": "sys.stdout.write('key ' + TOKEN[:9]); sys.stdout.write(TOKEN[9:])",
    "stderr": "print(f'key {TOKEN}', file=sys.stderr)",
    "a warning": "warnings.warn('key ' + TOKEN)",
    "logging": "logging.getLogger('mine').warning('key %s', TOKEN)",
    "a traceback": "import traceback\ntry: raise ValueError('key ' + TOKEN)\nexcept ValueError: traceback.print_exc()",
    "a thread": "t = threading.Thread(target=print, args=('key', TOKEN)); t.start(); t.join()",
    "a child": "pid = os.fork()\nif pid == 0:\n print('key', TOKEN)\n os._exit(0)\nos.waitpid(pid, 0)",
    "what it has read": "remember('plain c4n4ry words'); print('key plain c4n4ry words')",
    "a key of many lines": "print('key', chr(10).join(PEM))",
}


def printed(folder: Path, program: str, code: int = 0) -> str:
    """The log of a process that prints as a rank does."""
    log = folder / "logs" / "attempt_1" / "rank_0.log"
    log.parent.mkdir(parents=True)
    text = f"{BEGUN}TOKEN, PEM = {TOKEN!r}, {PEM!r}\n{program}\n"
    done = subprocess.run([sys.executable, "-c", text, str(log)], cwd=REPO, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (code, b""), done.stderr
    return log.read_text()


def test_no_secret_reaches_the_log_by_whatever_means(tmp_path: Path) -> None:
    log = printed(tmp_path, "\n".join(f"print('--- {means}')\n{program}\nprint()" for means, program in OUTPUT.items()))
    said = dict(part.partition("\n")[::2] for part in log.split("--- ")[1:])
    assert list(said) == list(OUTPUT)
    assert all("key" in text for text in said.values()), said
    assert {means for means, text in said.items() if "c4n4ry" in text} == set()


def test_the_rest_of_a_line_stays_as_it_was(tmp_path: Path) -> None:
    parts = [OUTPUT[means] for means in ("print", "print in pieces", "stderr", "what it has read")]
    assert printed(tmp_path, "\n".join([*parts, "print('the last, grüßt', end='')"])).splitlines() == [
        "key ...", "key ...", "key ...", "key ...", "the last, grüßt",
    ]  # fmt: skip


def test_a_line_is_there_before_its_rank_is_killed(tmp_path: Path) -> None:
    log = printed(tmp_path, f"print('last words')\nos.kill(os.getpid(), {int(signal.SIGKILL)})", -signal.SIGKILL)
    assert log == "last words\n"


def test_a_child_does_not_write_its_parent_s_half_line(tmp_path: Path) -> None:
    program = "sys.stdout.write('half')\npid = os.fork()\nif pid == 0: print(' of the child'); sys.exit()\n"
    assert printed(tmp_path, f"{program}os.waitpid(pid, 0)\nprint(' and the rest')").splitlines() == [
        " of the child", "half and the rest",
    ]  # fmt: skip


def test_what_went_past_python_is_redacted_where_it_is_printed_and_read(tmp_path: Path) -> None:
    """A library's own writes land on the disk as they are; no pod, driver or reader shows them."""
    log = printed(tmp_path, "os.write(1, f'key {TOKEN} of native code\\n'.encode())")
    assert TOKEN in log, "this is the limit that the page states"
    assert [line.text for line in read_logs(tmp_path, None, lambda: False)] == ["key ... of native code"]
    with open(tmp_path / "stdout", "wb") as out:
        tail = LogTail(Speaker(out, 0), {0: tmp_path / "logs" / "attempt_1" / "rank_0.log"}, 1)
        tail.end()
    assert (tmp_path / "stdout").read_text() == "[a1 r0 #1] key ... of native code\n"


def test_a_launcher_s_own_words_are_redacted(tmp_path: Path) -> None:
    with open(tmp_path / "stdout", "wb") as out:
        Speaker(out, 1).say(f"no luck with {TOKEN}")
    assert (tmp_path / "stdout").read_text() == "[a0 n1 #1] no luck with ...\n"


def test_the_streams_keep_what_programs_ask_of_them(tmp_path: Path) -> None:
    log = printed(
        tmp_path, "print(sys.stdout.isatty(), sys.stdout.fileno(), sys.stderr.encoding, sys.stdout.writable())"
    )
    assert log == "False 1 utf-8 True\n"
    assert os.path.getsize(tmp_path / "logs" / "attempt_1" / "rank_0.log") == len(log)
