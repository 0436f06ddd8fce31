"""The page on why shows what the command prints, and its commands end with the codes that it says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from orchestrator.cli.main import main
from orchestrator.cluster.why.catalogue import CATALOGUE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "why.md").read_text()
RUN = "digits-0123abcd"
SHOWN = ROOT / "tests" / "cluster" / "why" / "cases" / "preempted.preempted.json"


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot of a real cluster, and a run of this machine that met a mistake."""
    shutil.copy(SHOWN, tmp_path / "cluster.json")
    folder = tmp_path / "runs" / RUN
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run_id": RUN, "config": {}}))
    error = "recipe.global_batch_size = 7: must be at least 8. Way out: recipe.global_batch_size=8"
    (folder / "result.json").write_text(json.dumps({"state": "failed", "exit_code": 42, "error": error, "step": 0}))
    monkeypatch.chdir(tmp_path)


def test_the_commands_end_with_the_codes_that_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        said = re.search(r"exit code (\d+)", line)
        program, *arguments = shlex.split(line, comments=True)
        assert program == "orchestrator"
        assert main(arguments) == (int(said[1]) if said else 0), f"{line}: {capsys.readouterr().err}"


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    main(["why", "--snapshot", "cluster.json"])
    assert shown is not None
    assert capsys.readouterr().out == shown[1]


def test_the_page_lists_every_cause_and_no_other() -> None:
    assert dict(re.findall(r"^\| `([a-z0-9-]+)` \| (.*) \|$", PAGE, re.MULTILINE)) == dict(CATALOGUE)
