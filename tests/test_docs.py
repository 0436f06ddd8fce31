"""Every command of the README does what it says, in the order in which a newcomer types it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.compose import compose
from orchestrator.config import MAY_CHANGE

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
RUN_ID = "quickstart-00000000"
SHORT = {"orchestrator train experiment=quickstart recipe.epochs=2": ["max_steps=3"]}
"""What the test adds so that a command takes seconds."""


RELIABILITY = ROOT / "docs" / "reliability.md"


def lines_of(path: Path) -> list[str]:
    return [line for block in BLOCK.findall(path.read_text()) for line in block.splitlines() if line.strip()]


def readme_commands() -> list[str]:
    return [line.split("  #")[0].strip() for line in lines_of(ROOT / "README.md")]


def photos(folder: Path) -> None:
    from PIL import Image

    for number in range(40):
        path = folder / "photos" / ("cats" if number % 2 else "dogs") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (96, 80), (6 * number, 100, 250 - 6 * number)).save(path)


def test_the_readme_opens_with_the_two_commands() -> None:
    assert readme_commands()[:2] == ["make quickstart", "make test"]


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_the_two_commands_are_targets_of_the_makefile(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"quickstart": "orchestrator train experiment=quickstart", "test": "pytest"}[target] in done.stdout


def test_every_target_of_the_makefile_is_explained_by_make_help() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"\.PHONY: (.*)", text).group(1).split())  # pyright: ignore[reportOptionalMemberAccess]
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert phony - {"help"} <= set(re.findall(r"^  make (\S+)", shown, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.docs
@pytest.mark.timeout(240)
def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path: Path) -> None:
    photos(tmp_path)
    for command in readme_commands()[2:]:
        program, *arguments = shlex.split(command)
        runs = sorted((tmp_path / "runs").glob("quickstart-*"), key=lambda path: path.stat().st_mtime)
        if RUN_ID in command:
            arguments = [argument.replace(RUN_ID, runs[0].name) for argument in arguments]
        elif program == "torchrun":
            arguments.append("max_steps=3")
        arguments += SHORT.get(command, [])
        done = subprocess.run([BIN / program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.docs
@pytest.mark.timeout(600)
def test_the_commands_of_the_page_on_reliability_end_with_the_codes_that_it_says(tmp_path: Path) -> None:
    for line in lines_of(RELIABILITY):
        said = re.search(r"exit code (\d+)", line)
        program, *arguments = shlex.split(line, comments=True)
        done = subprocess.run([BIN / program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == (int(said[1]) if said else 0), f"{line}:\n{done.stdout}\n{done.stderr}"


def test_the_page_on_reliability_names_targets_and_keys_that_there_are() -> None:
    text = RELIABILITY.read_text()
    for target in re.findall(r"`make ([a-z-]+)`", text):
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
    listed = next(line for line in text.splitlines() if line.startswith("**What may change"))
    told = set(re.findall(r"`([a-z_.]+)`", listed))
    assert {key.removeprefix("compute.") for key in MAY_CHANGE} | {"compute"} == told


def test_the_page_on_reliability_states_the_defaults_of_the_configuration() -> None:
    config = compose([], []).config
    for keys, values in re.findall(r"^\| (`[a-z]+\..*?) \| (.*?) \|", RELIABILITY.read_text(), re.MULTILINE):
        group, names = keys.strip("`").partition(".")[0], re.findall(r"`(?:[a-z]+\.)?([a-z_]+)`", keys)
        shown = [value.strip(" `") for value in values.split(",")]
        for name, value in zip(names, shown, strict=True):
            found = getattr(getattr(config, group), name)
            assert value == words_of(found), f"{group}.{name}"


def words_of(value: object) -> str:
    """A default as the page writes it."""
    if value is None or isinstance(value, bool):
        return "–" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float | int) else str(getattr(value, "name", value))


@pytest.mark.timeout(120)
def test_the_commands_of_the_page_on_clusters_show_what_they_would_send(tmp_path: Path) -> None:
    kinds = []
    for line in lines_of(ROOT / "docs" / "clusters.md"):
        program, *arguments = shlex.split(line)
        done = subprocess.run([BIN / program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        shown = done.stdout + "".join(path.read_text() for path in tmp_path.glob("*.yaml"))
        kinds.append({kind for kind in ("kind: Job\n", "kind: JobSet\n", "entrypoint") if kind in shown})
    assert ["kind: Job\n" in kinds[0], "kind: JobSet\n" in kinds[1], "entrypoint" in kinds[2]] == [True] * 3


@pytest.mark.slow
@pytest.mark.docs
@pytest.mark.timeout(240)
def test_the_commands_of_the_page_on_plans_print_what_it_shows(tmp_path: Path) -> None:
    case = json.loads((ROOT / "tests/cluster/forecast/cases/eight_GPUs_on_nodes_of_four.json").read_text())
    (tmp_path / "cluster.json").write_text(json.dumps(case["snapshot"]))
    page, said = ROOT / "docs" / "plan.md", ""
    for line in lines_of(page):
        code = re.search(r"exit code (\d+)", line)
        program, *arguments = shlex.split(line, comments=True)
        done = subprocess.run([BIN / program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == int(code[1] if code else 0), f"{line}:\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    (shown,) = re.findall(r"```text\n(.*?)```", page.read_text(), re.DOTALL)
    assert shown in said
