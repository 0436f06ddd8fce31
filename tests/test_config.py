"""The schema: no defaults, every rule refuses by dotted key, plain values go through it and back unchanged."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from enum import Enum
from typing import Any

import pytest

from orchestrator import config as schema
from orchestrator.compose import compose, flatten, leaf_keys
from orchestrator.config import GROUPS, MAY_CHANGE, RunConfig
from orchestrator.errors import EXIT_USER, ConfigError
from orchestrator.plain import from_dict, to_dict

DATACLASSES = [kind for _, kind in inspect.getmembers(schema, dataclasses.is_dataclass)]
ENUMS = [kind for _, kind in inspect.getmembers(schema, inspect.isclass) if issubclass(kind, Enum) and kind is not Enum]

OUT_OF_BOUNDS: dict[str, list[Any]] = {
    "data.num_workers": [-1, 257],
    "data.prefetch_batches": [0, 65],
    "data.image_size": [0, 4097],
    "data.crop_scale": [[], [0.5], [0.0, 1.0], [0.9, 0.5], [0.5, 1.5], [0.1, 0.2, 0.3]],
    "data.crop_ratio": [[], [0.0, 1.0], [2.0, 1.0]],
    "data.padding": [-1, 4097],
    "data.flip": [-0.1, 1.1],
    "data.eval_resize": [-1, 7, 8193],
    "data.mean": [[], [0.5, 0.5], [0.5] * 4],
    "data.std": [[0.5, 0.5], [0.5, 0.5, 0.0], [-1.0, 0.5, 0.5]],
    "data.max_pixels": [0],
    "data.shuffle_shards": [-1],
    "model.num_classes": [1, 0, -5],
    "model.drop_path": [-0.1, 1.0],
    "model.dropout": [-0.1, 1.0],
    "optimizer.lr": [0.0, -0.1],
    "optimizer.base_batch_size": [0],
    "optimizer.momentum": [-0.1, 1.0],
    "optimizer.betas": [[0.9], [0.9, 1.0], [-0.1, 0.9]],
    "optimizer.eps": [-1e-9, 1.5],
    "optimizer.weight_decay": [-1e-9, 1.5],
    "recipe.epochs": [0],
    "recipe.global_batch_size": [0],
    "recipe.accumulate": [0, 65],
    "recipe.warmup_epochs": [-1.0, 10.5],
    "recipe.warmup_factor": [-0.1, 1.1],
    "recipe.final_factor": [-0.1, 1.1],
    "recipe.step_epochs": [[0], [-1], [60, 30], [30, 30]],
    "recipe.step_factor": [-0.1, 1.1],
    "recipe.label_smoothing": [-0.1, 1.0],
    "recipe.ema_decay": [-0.1, 1.0],
    "recipe.ema_every_steps": [0],
    "recipe.clip_norm": [-0.1],
    "compute.num_processes": ["0", "-1", "1.5", "two", "", "2:1"],
    "compute.threads_per_process": [0, 1025],
    "compute.master_port": [-1, 65536],
    "cluster.max_restarts": [-1],
    "cluster.grace_s": [0.5],
    "compute.num_nodes": [0, 4097],
    "cluster.cpus_per_process": [0.0, 1025.0],
    "cluster.memory_gib_per_process": [0.0],
    "cluster.disk_gib": [-1.0],
    "cluster.user_id": [0, -1, 2**31],
    "cluster.lost_node_s": [-1.0],
    "cluster.start_deadline_s": [-1.0],
    "cluster.deadline_s": [-1.0],
    "cluster.ttl_s": [-1.0],
    "cluster.namespace": ["", "a b", "Team", "-a", "a\n"],
    "cluster.queue": ["gpus/a"],
    "cluster.priority": ["high!"],
    "cluster.service_account": ["system:node"],
    "checkpointing.every_epochs": [-1],
    "checkpointing.every_steps": [-1],
    "checkpointing.keep_last": [0],
    "tracking.log_every_steps": [0],
    "tracking.init_timeout_s": [0.0],
    "name": ["", "Big", "-a", "a-", "a_b", "ü", "a" * 32, "a\n"],
    "seed": [-1, 2**63],
    "max_steps": [0],
    "eval_batch_size": [0],
}
AT_THE_BOUNDS: dict[str, list[Any]] = {
    "data.num_workers": [0, 256],
    "data.eval_resize": [0, 8, 8192],
    "data.crop_scale": [[1.0, 1.0], [0.001, 1.0]],
    "data.flip": [0.0, 1.0],
    "model.num_classes": [2, None],
    "optimizer.betas": [[0.0, 0.0]],
    "recipe.accumulate": [64],
    "recipe.warmup_epochs": [0.0, 10.0],
    "recipe.step_epochs": [[], [1], [30, 60, 80]],
    "compute.num_processes": ["auto", "1", "64"],
    "compute.master_port": [0, 65535],
    "name": ["a", "7", "a" * 31, "a-b"],
    "seed": [0, 2**63 - 1],
}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return to_dict(compose([]).config)


def changed(plain: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy in which one dotted key has another value."""
    group, _, last = key.rpartition(".")
    return {**plain, group: {**plain[group], last: value}} if group else {**plain, key: value}


@pytest.mark.parametrize(("key", "value", "example"), [
    ("cluster.env", ["1A=x"], "NCCL_DEBUG=WARN"), ("cluster.env", ["A"], "NCCL"), ("cluster.env", ["A=\0"], "NCCL"),
    ("cluster.node_selector", ["pool"], "pool=a100"), ("cluster.node_selector", ["a b=c"], "pool=a100"),
    ("cluster.tolerations", ["gpu"], "nvidia.com/gpu:NoSchedule"), ("cluster.tolerations", ["a=b:Never"], "NoSch"),
    ("cluster.spot", ["spot"], "nvidia.com/gpu:NoSchedule"), ("cluster.pull_secrets", ["Reg"], "registry"),
    ("cluster.prices", ["cpu"], "cpu=0.04"),
])  # fmt: skip
def test_an_entry_of_a_list_is_refused_by_itself_with_an_example(
    plain: dict[str, Any], key: str, value: list[str], example: str
) -> None:
    with pytest.raises(ConfigError, match=example) as caught:
        from_dict(changed(plain, key, value))
    assert (caught.value.key, caught.value.value) == (key, value[0])


@pytest.mark.parametrize(("volume", "said"), [
    ({"claim": "Data", "path": "/data", "read_only": True}, "name of a claim"),
    ({"claim": "data", "path": "data", "read_only": True}, "absolute path"),
    ({"claim": "data", "path": "/", "read_only": True}, "absolute path"),
    ({"claim": "data", "path": "/a/../b", "read_only": True}, "absolute path"),
    ({"claim": "data", "path": "/data:ro", "read_only": True}, "absolute path"),
    ({"claim": "data", "path": "/data", "read_only": "yes"}, "true or false"),
    ({"claim": "data", "path": "/data"}, "must be set"), ({"claim": "data", "pth": "/d"}, "did you mean 'path'"),
    ("data:/data", "claim: ..., path: ..., read_only: ..."),
])  # fmt: skip
def test_a_volume_is_refused_with_the_form_that_works(plain: dict[str, Any], volume: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        from_dict(changed(plain, "cluster.volumes", [volume]))
    assert caught.value.key.startswith("cluster.volumes")


def test_volumes_go_through_the_schema_and_back_and_never_share_a_path(plain: dict[str, Any]) -> None:
    data, runs = ({"claim": name, "path": f"/{name}", "read_only": name == "data"} for name in ("data", "runs"))
    config = from_dict(changed(plain, "cluster.volumes", [data, runs]))
    assert to_dict(config)["cluster"]["volumes"] == [data, runs]
    assert compose(["cluster.volumes=[{claim: runs, path: /runs, read_only: false}]"]).config.cluster.volumes == [
        from_dict(changed(plain, "cluster.volumes", [runs])).cluster.volumes[0]
    ]
    with pytest.raises(ConfigError, match="mounted twice"):
        from_dict(changed(plain, "cluster.volumes", [data, {**runs, "path": "/data"}]))


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(key, value, id=f"{key}={value!r}") for key, values in table.items() for value in values]


@pytest.mark.parametrize("kind", DATACLASSES)
def test_no_dataclass_holds_a_default_and_none_takes_unknown_attributes(kind: Any) -> None:
    for field in dataclasses.fields(kind):
        assert field.default is dataclasses.MISSING, field.name
        assert field.default_factory is dataclasses.MISSING, field.name
        assert field.kw_only, field.name
    assert "__slots__" in vars(kind)
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{kind.__name__}(")


@pytest.mark.parametrize("kind", ENUMS)
def test_enums_are_named_as_users_type_them(kind: type[Enum]) -> None:
    assert kind.__doc__
    assert [member.name for member in kind] == [member.value for member in kind]


def test_groups_are_the_nested_dataclasses() -> None:
    nested = [name for name, value in to_dict(compose([]).config).items() if isinstance(value, dict)]
    assert nested == list(GROUPS)


@pytest.mark.parametrize(("key", "value"), cases(OUT_OF_BOUNDS))
def test_a_value_that_breaks_a_rule_is_refused_by_its_dotted_key(plain: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(changed(plain, key, value))
    assert caught.value.key == key
    assert caught.value.value == value
    assert caught.value.rule
    assert caught.value.way_out
    assert str(caught.value).startswith(f"{key} = {value}: ")
    assert caught.value.exit_code == EXIT_USER


@pytest.mark.parametrize(("key", "value"), cases(AT_THE_BOUNDS))
def test_the_bounds_themselves_are_taken(plain: dict[str, Any], key: str, value: Any) -> None:
    assert flatten(to_dict(from_dict(changed(plain, key, value))))[key] == value


@pytest.mark.parametrize(("processes", "batch", "accumulate", "key"), [
    ("4", 3, 1, "recipe.global_batch_size"), ("4", 7, 2, "recipe.accumulate"), ("auto", 1, 2, "recipe.accumulate"),
])  # fmt: skip
def test_a_batch_that_leaves_a_process_without_images_is_refused_with_a_value_that_works(
    plain: dict[str, Any], processes: str, batch: int, accumulate: int, key: str
) -> None:
    values = changed(plain, "compute.num_processes", processes)
    values = changed(values, "recipe.global_batch_size", batch)
    values = changed(values, "recipe.accumulate", accumulate)
    with pytest.raises(ConfigError) as caught:
        from_dict(values)
    assert caught.value.key == key
    mended, value = caught.value.way_out.split(" or ")[0].split("=")
    from_dict(changed(values, mended, int(value)))


@pytest.mark.parametrize("key", leaf_keys())
@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": 1}, [[1]], object()], ids=lambda value: str(value)[:7])
def test_no_value_of_a_wrong_kind_passes_or_ends_in_a_traceback(plain: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(changed(plain, key, value))
    assert caught.value.key == key


@pytest.mark.parametrize(("key", "value", "rule"), [
    ("recipe.epochs", 1.5, "whole number"), ("recipe.epochs", "ten", "whole number"), ("recipe.epochs", True, "whole"),
    ("recipe.epochs", None, "whole number"), ("optimizer.lr", "fast", "a number"), ("optimizer.lr", False, "a number"),
    ("optimizer.nesterov", 1, "true or false"), ("optimizer.nesterov", "yes", "true or false"),
    ("data.train", True, "text"), ("data.train", None, "text"), ("data.mean", 0.5, "list"), ("data.mean", "x", "list"),
    ("data.mean", [0.5, "x", 0.5], "a number"), ("recipe.step_epochs", [1.5], "whole number"),
    ("tracking.tags", ["a", None], "text"), ("data.crop", "square", "random_resized, pad, none"),
])  # fmt: skip
def test_a_wrong_type_is_refused_by_the_type_that_was_meant(
    plain: dict[str, Any], key: str, value: Any, rule: str
) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        from_dict(changed(plain, key, value))
    assert caught.value.key == key


def test_numbers_are_taken_in_the_type_of_the_key(plain: dict[str, Any]) -> None:
    values = changed(changed(plain, "recipe.epochs", 12.0), "recipe.warmup_epochs", 2)
    config = from_dict(changed(values, "compute.num_processes", 2))
    assert (config.recipe.epochs, config.recipe.warmup_epochs, config.compute.num_processes) == (12, 2.0, "2")
    assert [type(v) for v in (config.recipe.epochs, config.recipe.warmup_epochs)] == [int, float]


@pytest.mark.parametrize("key", [*GROUPS, *leaf_keys()])
def test_a_missing_key_is_named(plain: dict[str, Any], key: str) -> None:
    group, _, last = key.rpartition(".")
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in plain.items()}
    (values[group] if group else values).pop(last)
    with pytest.raises(ConfigError, match="must be set") as caught:
        from_dict(values)
    assert caught.value.key == key


@pytest.mark.parametrize(("key", "hint"), [("sed", "seed"), ("data.num_worker", "num_workers"), ("modle", "model")])
def test_an_unknown_key_is_refused_with_the_nearest_one(plain: dict[str, Any], key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{hint}'") as caught:
        from_dict(changed(plain, key, 1))
    assert caught.value.key == key


def test_plain_values_go_through_the_schema_and_back_unchanged(plain: dict[str, Any]) -> None:
    config = from_dict(plain)
    assert isinstance(config, RunConfig)
    assert to_dict(config) == plain
    assert from_dict(to_dict(config)) == config
    assert list(flatten(plain)) == leaf_keys()


def test_the_keys_that_may_change_between_attempts_are_stated_once_and_are_few() -> None:
    assert set(MAY_CHANGE) == {
        "cluster", "tracking", "checkpointing", "runs_dir", "data_dir", "eval_batch_size", "data.num_workers",
        "data.prefetch_batches", "data.cache_gib", "recipe.on_nan", "compute.num_processes", "compute.device",
        "compute.num_nodes", "compute.threads_per_process", "compute.master_port", "compute.max_time_s",
        "compute.check_ranks_every_steps",
    }  # fmt: skip
    assert set(MAY_CHANGE) <= {*GROUPS, *leaf_keys()}
