"""The frozen run: an id from the content, a file that every process loads and nobody edits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import pytest

from orchestrator.bundle import Bundle, freeze, load_bundle, run_id, write_bundle
from orchestrator.compose import compose, leaf_keys
from orchestrator.config import MAY_CHANGE, RunConfig
from orchestrator.errors import EXIT_USER, ConfigError, UserError
from orchestrator.plain import from_dict, to_dict

BY_HAND = {
    "data.color_jitter": [0.4, 0.4, 0.4, 0.1], "data.ramp_epochs": [1, 2],
    "name": "another", "compute.num_processes": "1", "data.eval_resize": 9, "recipe.step_epochs": [1],
    "tracking.tags": ["x"], "compute.virtual_ranks": "4", "cluster.prices": ["cpu=0.04"],
    "checkpointing.metric": "val/loss", "checkpointing.mirror": "s3://bucket/runs",
    "cluster.pull_secrets": ["registry"], "cluster.code_files": ["more.py"], "cluster.env": ["A=1"],
    "cluster.code_store": "s3://bucket/code",
    "cluster.volumes": [{"claim": "runs", "path": "/runs", "read_only": False}], "cluster.spot": ["spot:NoSchedule"],
    "cluster.node_selector": ["pool=a100"], "cluster.tolerations": ["gpu:NoSchedule"],
}  # fmt: skip
"""Other values where the general rule of `other` gives one that the schema refuses."""
NOT_ALONE = {"data_dir"}
"""Moves data.train along, as composition does: see the test of composed runs."""
ID = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?-[0-9a-f]{8}")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return freeze(compose(["seed=3", "data.num_workers=0"]))


@pytest.fixture(scope="module")
def plain(bundle: Bundle) -> dict[str, Any]:
    return to_dict(bundle.config)


def hint_of(key: str) -> Any:
    kind: Any = RunConfig
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    return get_args(kind)[0] if isinstance(kind, UnionType) else kind


def other(key: str, value: Any) -> Any:
    """A valid value of the key that differs from `value`."""
    hint = hint_of(key)
    if key in BY_HAND:
        return BY_HAND[key]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return next(name for name in hint.__members__ if name != value)
    if isinstance(value, list):
        return [item / 2 for item in value]
    if hint is bool:
        return not value
    if hint is int:
        return (value or 4) + 1
    if hint is float:
        return value / 2 if value else 0.5
    return f"{value or ''}x"


def changed(plain: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    group, _, last = key.rpartition(".")
    return {**plain, group: {**plain[group], last: value}} if group else {**plain, key: value}


@pytest.mark.parametrize("key", [key for key in leaf_keys() if key not in NOT_ALONE])
def test_a_key_changes_the_id_unless_it_may_change_between_attempts(plain: dict[str, Any], key: str) -> None:
    before = plain
    for part in key.split("."):
        before = before[part]
    config = from_dict(changed(plain, key, other(key, before)))
    assert config != from_dict(plain)
    may_change = any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    assert (run_id(config) == run_id(from_dict(plain))) == may_change


@pytest.mark.parametrize("overrides", [
    ["data_dir=/elsewhere/data"], ["data_dir=/elsewhere/"], ["runs_dir=/elsewhere"], ["compute.num_processes=2"],
    ["compute.device=cpu"], ["tracking=disabled"], ["checkpointing=steps"], ["data.num_workers=0"],
    ["recipe.warmup_epochs=1"], ["seed=0", "data=digits"],
])  # fmt: skip
def test_what_may_change_or_says_the_same_keeps_the_id_of_a_composed_run(overrides: list[str]) -> None:
    assert run_id(compose(overrides).config) == run_id(compose([]).config)


@pytest.mark.parametrize("overrides", [["data.train=other/train"], ["data.val=data/other/val"], ["compute=gpu"]])
def test_other_data_or_arithmetic_is_another_run(overrides: list[str]) -> None:
    assert run_id(compose(overrides).config) != run_id(compose([]).config)


@pytest.mark.parametrize("name", ["a", "7", "a-b", "a" * 31, "x-" * 15 + "x"])
def test_an_id_is_the_name_and_eight_digits_within_forty_characters(plain: dict[str, Any], name: str) -> None:
    id = run_id(from_dict(changed(plain, "name", name)))
    assert ID.fullmatch(id)
    assert id.startswith(f"{name}-")
    assert len(id) <= 40


def test_the_order_of_overrides_does_not_change_the_id() -> None:
    overrides = ["recipe=goyal_1h", "seed=4", "optimizer.lr=0.5"]
    assert len({run_id(compose(order).config) for order in (overrides, overrides[::-1])}) == 1


def test_the_id_is_the_same_in_every_process() -> None:
    program = (
        "from orchestrator.compose import compose; from orchestrator.bundle import run_id;"
        "print(run_id(compose(['experiment=quickstart', 'tracking.tags=[b,a]']).config))"
    )
    root = Path(__file__).parents[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    ids = [process.communicate(timeout=60)[0].strip() for process in started]
    assert ids == [run_id(compose(["experiment=quickstart"]).config)] * 2


def test_a_bundle_comes_back_from_its_file_as_it_was(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "runs" / bundle.run_id / "run.json"
    write_bundle(bundle, path, {"train": {"digest": "d"}})
    assert load_bundle(path) == bundle
    content = json.loads(path.read_text())
    assert content["schema"] == 1
    assert content["name"] == bundle.config.name
    assert content["data"] == {"train": {"digest": "d"}}
    assert content["config"] == to_dict(bundle.config)
    assert bundle.folder == Path("runs") / bundle.run_id


def test_a_bundle_says_what_it_was_made_with(bundle: Bundle) -> None:
    assert bundle.overrides == ("seed=3", "data.num_workers=0")
    assert bundle.sources["seed"] == "override"
    assert set(bundle.sources) == set(leaf_keys())
    assert all(re.fullmatch(r"[0-9a-f]{64}", text) for text in (bundle.config_hash, bundle.code_digest))
    assert "missing" not in bundle.versions.values()
    assert bundle.config_hash != freeze(compose(["seed=4", "data.num_workers=0"])).config_hash


@pytest.mark.parametrize("key", ["seed", "optimizer.lr", "runs_dir", "compute.num_processes"])
def test_an_edited_bundle_is_refused(bundle: Bundle, plain: dict[str, Any], tmp_path: Path, key: str) -> None:
    path = tmp_path / "run.json"
    write_bundle(bundle, path, {})
    content = json.loads(path.read_text())
    value = content["config"]
    for part in key.split("."):
        value = value[part]
    content["config"] = changed(content["config"], key, other(key, value))
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"was edited.*Way out") as caught:
        load_bundle(path)
    assert caught.value.exit_code == EXIT_USER


def test_a_bundle_edited_to_a_forbidden_value_names_the_key(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_bundle(bundle, path, {})
    path.write_text(path.read_text().replace('"seed": 3', '"seed": -3'))
    with pytest.raises(ConfigError, match="seed = -3"):
        load_bundle(path)


@pytest.mark.parametrize(("content", "says"), [
    ({"schema": 2}, "has schema 2, this version reads 1"), ({}, "has schema None"), ([], "has schema None"),
    ({"schema": 1, "run_id": "x"}, "lacks config, config_hash, overrides"),
])  # fmt: skip
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        load_bundle(path)


@pytest.mark.parametrize("drop", Bundle.__dataclass_fields__)
def test_a_bundle_without_a_part_is_refused_by_the_name_of_the_part(bundle: Bundle, tmp_path: Path, drop: str) -> None:
    path = tmp_path / "run.json"
    write_bundle(bundle, path, {})
    content = json.loads(path.read_text())
    del content[drop]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"lacks {drop}. Way out"):
        load_bundle(path)


def test_a_missing_or_torn_bundle_is_the_users_mistake(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(UserError, match="does not exist"):
        load_bundle(path)
    write_bundle(bundle, path, {})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_bundle(path)
