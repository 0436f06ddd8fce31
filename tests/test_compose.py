"""Composition: every file of conf/ makes a checked config, each value says where it came from, mistakes are named."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.compose import CHOICES, OVERRIDE, Composed, choices, compose, conf_dir, flatten, leaf_keys, overlay
from orchestrator.compose import render as render_config
from orchestrator.config import GROUPS
from orchestrator.errors import EXIT_USER, ConfigError, UserError
from orchestrator.plain import to_dict

compose_once = functools.cache(lambda *overrides: compose(overrides))
FILES = sorted(path.relative_to(conf_dir()) for path in conf_dir().rglob("*.yaml"))
CHOOSABLE = [path for path in FILES if path.parent != Path() and path.stem != "defaults"]

MISTAKES: list[tuple[list[str], str, str, str]] = [
    # overrides, key, rule, way out
    (["sed=1"], "sed", "is not a key", "'seed'"),
    (["optimizer.lrr=1"], "optimizer.lrr", "is not a key", "'optimizer.lr'"),
    (["optimiser.lr=1"], "optimiser.lr", "is not a key", "'optimizer.lr'"),
    (["lr=0.1"], "lr", "is not a key", "'optimizer.lr'"),
    (["epochs=3"], "epochs", "is not a key", "'recipe.epochs'"),
    (["model.lr=0.1"], "model.lr", "is not a key", "'optimizer.lr'"),
    (["kind=sgd"], "kind", "is not a key", "'optimizer.kind' or 'cluster.kind'"),
    (["data.num_worker=2"], "data.num_worker", "is not a key", "'data.num_workers'"),
    (["+data.num_worker=2"], "data.num_worker", "is not a key", "'data.num_workers'"),
    (["++data.num_worker=2"], "data.num_worker", "is not a key", "'data.num_workers'"),
    (["~data.num_worker"], "data.num_worker", "is not a key", "'data.num_workers'"),
    (["seed.foo=1"], "seed.foo", "is not a key", "'seed'"),
    (["data.name.foo=1"], "data.name.foo", "is not a key", "'data.name'"),
    (["model._target_=os.system"], "model._target_", "is not a key", "model."),
    (["optimizr=sgd"], "optimizr", "is not a key", "'optimizer'"),
    (["hydra.run.dir=x"], "hydra.run.dir", "is not a key", "did you mean"),
    (["hydra.searchpath=[file:///tmp]"], "hydra.searchpath", "is not a key", "one of"),
    (["hydra/launcher=basic"], "hydra/launcher", "is not a key", ""),
    (["optimizer=sgdd"], "optimizer", "is no file of conf/optimizer/", "'sgd'"),
    (["model=resnet18.yaml"], "model", "is no file of conf/model/", "'resnet18'"),
    (["model=../model/resnet18"], "model", "is no file of conf/model/", "'resnet18'"),
    (["model=defaults"], "model", "is no file of conf/model/", "resnet18"),
    (["model=null"], "model", "is no file of conf/model/", "resnet18"),
    (["model=[resnet18,resnet34]"], "model", "is no file of conf/model/", "resnet"),
    (["data={name:x}"], "data", "is no file of conf/data/", "digits"),
    (["experiment=quikstart"], "experiment", "is no file of conf/experiment/", "'quickstart'"),
    (["experiment=null"], "experiment", "is no file of conf/experiment/", "quickstart"),
    (["data.crop=paad"], "data.crop", "must be one of random_resized, pad, none", "'pad'"),
    (["compute.precision=bf61"], "compute.precision", "must be one of fp32, bf16, fp16", "'bf16'"),
    (["optimizer.lr=fast"], "optimizer.lr", "must be a number", "optimizer.lr"),
    (["optimizer.lr=nan"], "optimizer.lr", "must be a number", "optimizer.lr"),
    (["recipe.epochs=1.5"], "recipe.epochs", "must be a whole number", "recipe.epochs"),
    (["recipe.epochs=inf"], "recipe.epochs", "must be a whole number", "recipe.epochs"),
    (["recipe.epochs=1e400"], "recipe.epochs", "must be a whole number", "recipe.epochs"),
    (["recipe.epochs=null"], "recipe.epochs", "must be a whole number", "recipe.epochs"),
    (["model.zero_init_last=yes"], "model.zero_init_last", "must be true or false", "model.zero_init_last"),
    (["data.mean=0.5"], "data.mean", "must be a list", "data.mean=[0.5]"),
    (["data.train={a:b}"], "data.train", "must be text", "data.train"),
    (["data.train=${nope}"], "data.train", "Interpolation key 'nope' not found", "data.train"),
    (["data.train=???"], "data.train", "Missing mandatory value", "data.train"),
    (["seed=1,2"], "seed", "names several values", "one value"),
    (["seed=range(1,3)"], "seed", "names several values", "one value"),
    (["model=choice(resnet18,resnet34)"], "model", "names several values", "one value"),
    (["optimizer.lr=tag(log,interval(0.01,1.0))"], "optimizer.lr", "names several values", "one value"),
    (["~seed"], "seed", "only key=value", "seed=VALUE"),
    (["~data"], "data", "only key=value", "data=VALUE"),
    (["+seed=3"], "seed", "only key=value", "seed=VALUE"),
    (["+data=cifar10"], "data", "only key=value", "data=VALUE"),
    (["++data=cifar10"], "data", "only key=value", "data=VALUE"),
    (["+experiment=quickstart"], "experiment", "only key=value", "experiment=VALUE"),
    (["data@model=cifar10"], "data", "only key=value", "data=VALUE"),
    (["seed"], "override", "cannot be read", "key=value"),
    (["=1"], "", "is not a key", "one of"),
    (["optimizer.lr==1"], "override", "cannot be read", "key=value"),
    (["data.train=https://h/x-{000..009}.tar"], "override", "cannot be read", "quote"),
    (["recipe.global_batch_size=1", "compute.num_processes=2"], "recipe.global_batch_size", "at least", "=2"),
]


@pytest.fixture(scope="module")
def base() -> Composed:
    return compose_once()


def own_group(folder: Path, **files: str) -> Path:
    """A user's config dir; `model__mine` is model/mine.yaml."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def values_of(name: str, package: str) -> dict[str, Any]:
    """What a file says itself, by dotted key of the config."""
    text = (conf_dir() / name.removeprefix("conf/")).read_text()
    content = yaml.safe_load(text) or {}
    content.pop("defaults", None)
    return flatten(content, "" if "@package _global_" in text or not package else f"{package}.")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_names_a_python_object(path: Path) -> None:
    assert "_target_" not in (conf_dir() / path).read_text()


def test_every_folder_of_conf_is_a_group_and_every_group_a_folder() -> None:
    assert {path.parts[0] for path in FILES if len(path.parts) > 1} == set(CHOICES)
    assert all(len(path.parts) <= 2 for path in FILES)


@pytest.mark.parametrize("path", CHOOSABLE, ids=str)
def test_every_file_composes_and_each_value_is_what_the_named_file_says(path: Path) -> None:
    composed = compose_once(f"{path.parent}={path.stem}")
    values = flatten(to_dict(composed.config))
    assert list(values) == leaf_keys()
    assert set(composed.sources) == set(values)
    for key, source in composed.sources.items():
        assert source.startswith("conf/")
        group = key.partition(".")[0] if "." in key else ""
        said = values_of(source, group)[key]
        if not (isinstance(said, str) and "${" in said):
            assert said == values[key] or str(said) == values[key], (key, source)


@pytest.mark.parametrize("path", CHOOSABLE, ids=str)
def test_a_chosen_file_has_its_say_over_the_groups_it_touches(path: Path) -> None:
    composed = compose_once(f"{path.parent}={path.stem}")
    said = values_of(f"conf/{path}", "" if path.parent.name == "experiment" else str(path.parent))
    assert said or path.stem in ("auto", "local")  # what the defaults say
    later = {key for key in said if composed.sources[key] != f"conf/{path}"}
    assert not later


def test_the_last_word_is_override_over_experiment_over_recipe_over_group_over_defaults(tmp_path: Path) -> None:
    own = own_group(
        tmp_path,
        experiment__layers="# @package _global_\ndefaults:\n  - override /recipe: goyal_1h\n  - _self_\n"
        "optimizer:\n  lr: 0.3\n  momentum: 0.8\n",
    )
    composed = compose(["experiment=layers", "optimizer.lr=0.7"], [own])
    expected = {
        "optimizer.lr": (0.7, OVERRIDE),
        "optimizer.momentum": (0.8, str(own / "experiment/layers.yaml")),
        "optimizer.nesterov": (True, "conf/recipe/goyal_1h.yaml"),
        "optimizer.kind": ("sgd", "conf/optimizer/sgd.yaml"),
        "optimizer.eps": (1e-8, "conf/optimizer/defaults.yaml"),
        "recipe.epochs": (90, "conf/recipe/goyal_1h.yaml"),
        "recipe.accumulate": (1, "conf/recipe/defaults.yaml"),
        "seed": (0, "conf/config.yaml"),
    }
    values = flatten(to_dict(composed.config))
    assert {key: (values[key], composed.sources[key]) for key in expected} == expected


def test_a_user_brings_groups_of_their_own_that_build_on_ours(tmp_path: Path, base: Composed) -> None:
    own = own_group(
        tmp_path / "my conf, v=2 [x] it's",
        model__mine="defaults: [defaults]\nname: resnet34\ndropout: 0.25\n",
        experiment__both="# @package _global_\ndefaults: [{override /model: mine}]\nseed: 3\n",
    )
    composed = compose(["experiment=both"], [own])
    model = to_dict(base.config.model) | {"name": "resnet34", "dropout": 0.25}
    assert to_dict(composed.config) == to_dict(base.config) | {"model": model, "seed": 3}
    assert composed.sources["model.dropout"] == str(own / "model/mine.yaml")
    assert composed.sources["model.stem"] == "conf/model/defaults.yaml"
    assert composed.sources["seed"] == str(own / "experiment/both.yaml")
    assert "mine" in choices("model", [conf_dir(), own])


@pytest.mark.parametrize(("text", "error", "says"), [
    ("defaults: [defaults]\nname: x\nfoo: 1\n", ConfigError, "model.foo = 1: is not a key"),
    ("defaults: [defaults]\nname: x\n_target_: os.system\n", ConfigError, "model._target_ = os.system: is not a key"),
    ("defaults: [defaults]\n", ConfigError, "model.name = .*Missing mandatory value"),
    ("defaults: [defaults]\nname: ${nope}\n", ConfigError, "model.name = .*'nope' not found"),
    ("name: x\n", ConfigError, "model.num_classes = .*must be set"),
    ("", ConfigError, "model.name = .*must be set"),
    ("defaults: [nope]\nname: x\n", UserError, "model=mine: .*model/nope.* Way out"),
    ("defaults: [defaults\nname: x\n", UserError, "mine.yaml cannot be read as YAML.*(?s:.*)line 2.*Way out"),
    ("- 1\n- 2\n", UserError, "mine.yaml holds a list.*Way out"),
    ("text", ConfigError, "model.text = None: is not a key"),
    ("3", UserError, "mine.yaml cannot be read as YAML.*Way out"),
])  # fmt: skip
def test_a_mistake_in_a_users_file_is_named(tmp_path: Path, text: str, error: type[UserError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        compose(["model=mine"], [own_group(tmp_path, model__mine=text)])
    assert caught.value.exit_code == EXIT_USER


def test_a_users_file_with_the_name_of_an_earlier_one_is_refused_instead_of_ignored(tmp_path: Path) -> None:
    ours = own_group(tmp_path / "a", model__resnet18="defaults: [defaults]\nname: mine\n")
    with pytest.raises(ConfigError, match=r"has the name of .*conf/model/resnet18\.yaml"):
        compose([], [ours])
    pair = [own_group(tmp_path / name, model__x="defaults: [defaults]\nname: x\n") for name in ("b", "c")]
    with pytest.raises(ConfigError, match=r"c/model/x\.yaml: has the name of .*b/model/x\.yaml"):
        compose([], pair)


def test_a_config_dir_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config-dir = .*nope: is not a folder"):
        compose([], [tmp_path / "nope"])


@pytest.mark.parametrize(("overrides", "key", "rule", "way_out"), MISTAKES, ids=lambda part: str(part)[:40])
def test_a_mistake_is_refused_by_key_with_the_rule_and_the_way_out(
    overrides: list[str], key: str, rule: str, way_out: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    error = caught.value
    assert error.key == key
    assert rule in error.rule
    assert way_out in error.way_out
    assert error.exit_code == EXIT_USER
    assert "\n" not in str(error)


def test_a_hint_never_names_a_key_twice() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["qqqqq=1"])
    names = caught.value.way_out.removeprefix("one of: ").split(" ...")[0].split(", ")
    assert len(names) == len(set(names)) == 20


@pytest.mark.parametrize(("override", "key", "value"), [
    ("++seed=3", "seed", 3), ("model.num_classes=null", "model.num_classes", None), ("name=1", "name", "1"),
    ("compute.num_processes=2", "compute.num_processes", "2"), ("data.mean=[0,0.5,1]", "data.mean", [0.0, 0.5, 1.0]),
    ("tracking.tags=[a,1]", "tracking.tags", ["a", "1"]), ("data.train='x-{0..9}.tar'", "data.train", "x-{0..9}.tar"),
    ("data.train=a b", "data.train", "a b"), ("data.val=${runs_dir}/x", "data.val", "runs/x"),
    ("recipe.epochs=3.0", "recipe.epochs", 3), ("data.train=https://h/x-0.tar", "data.train", "https://h/x-0.tar"),
])  # fmt: skip
def test_an_override_is_taken_as_meant_and_named_as_the_source(override: str, key: str, value: Any) -> None:
    composed = compose([override])
    assert flatten(to_dict(composed.config))[key] == value
    assert composed.sources[key] == OVERRIDE
    assert composed.typed_keys() == {key}
    assert [k for k, source in composed.sources.items() if source == OVERRIDE] == [key]


def test_the_last_of_two_overrides_counts() -> None:
    composed = compose(["seed=1", "data=cifar10", "seed=2", "data=digits"])
    assert (composed.config.seed, composed.config.data.name) == (2, "digits")


def test_the_order_of_different_overrides_does_not_matter() -> None:
    overrides = ["recipe=goyal_1h", "optimizer.lr=0.5", "data=synthetic", "seed=3"]
    configs = [compose(order).config for order in itertools.islice(itertools.permutations(overrides), 0, None, 8)]
    assert all(config == configs[0] for config in configs)


@pytest.mark.parametrize("overrides", [
    [], ["experiment=imagenet_resnet50", "seed=3"],
    ["data.train='" + "a path: with blanks # and " * 9 + "'", "tracking.tags=[a,'b: c','#d',e f]", "data.val='ü'"],
])  # fmt: skip
def test_the_shown_config_is_yaml_equal_to_the_config_with_one_source_behind_each_value(overrides: list[str]) -> None:
    composed = compose(overrides)
    text = render_config(composed)
    assert yaml.safe_load(text) == to_dict(composed.config)
    lines = text.splitlines()
    assert len(lines) == len(leaf_keys()) + len(GROUPS)
    keys = iter(leaf_keys())
    for line in lines:
        if line.startswith(" ") or line.partition(":")[0] not in GROUPS:
            assert line.endswith(f"  # {composed.sources[next(keys)]}")


def test_only_what_was_typed_replaces_a_frozen_config(base: Composed) -> None:
    frozen = to_dict(compose(["seed=5", "optimizer=adamw", "recipe.epochs=7", "model.dropout=0.5"]).config)
    before = yaml.safe_dump(frozen)
    laid = overlay(frozen, compose(["optimizer=lamb", "recipe.epochs=9", "model.drop_path=0.1"]))
    expected = {
        **frozen,
        "optimizer": to_dict(compose(["optimizer=lamb"]).config.optimizer),
        "recipe": frozen["recipe"] | {"epochs": 9},
        "model": frozen["model"] | {"drop_path": 0.1},
    }
    assert laid == expected
    assert overlay(frozen, base) == frozen
    assert yaml.safe_dump(frozen) == before


@pytest.mark.parametrize("value", ["${now:%Y}", "${oc.env:HOME}", "run-${hydra:job.id}"])
def test_an_override_cannot_take_its_value_from_the_clock_or_the_environment(value: str) -> None:
    with pytest.raises(ConfigError, match="calls a resolver"):
        compose([f"name={value}"])


def test_another_optimizer_under_a_recipe_needs_its_own_learning_rate() -> None:
    with pytest.raises(ConfigError, match=r"optimizer = adamw: would run with the optimizer.lr = 0.1 that conf/recipe"):
        compose(["recipe=goyal_1h", "optimizer=adamw"])
    assert compose(["recipe=goyal_1h", "optimizer=adamw", "optimizer.lr=1e-3"]).config.optimizer.lr == 1e-3
    assert compose(["recipe=goyal_1h"]).config.optimizer.lr == 0.1
