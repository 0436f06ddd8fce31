"""Slots are filled by structure, and what is printed is read back as what it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cluster.kubernetes.templates import SLOT, template, templates_dir, to_yaml

K8S = templates_dir().parent
HOSTILE = [
    "a: b\n---\nkind: Secret", "'", '"', "`", "${name}", "$(HOME)", "{{ x }}", "&anchor", "*alias", "!!python/object:x",
    "yes", "No", "on", "y", "null", "~", "", " ", "\t", "1e3", "0x10", "0o7", "1_000", "12:30:45", "2026-11-24", ".5",
    "+1", "-", "- a", "? x", "# no comment", "a #b", "a\r\nb", "trailing ", "\n", "x" * 300, "ü–漢字🙂", "%", "@at",
    "|", ">", "\u2028", "\x85", "9e12345678", "=", "<<",
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_hostile_text_stays_the_value_that_it_was(value: str):
    found = template("run_config_map", name=value, labels={value: value, "b": "c"}, run_json=value)
    assert found["metadata"]["name"] == found["data"]["run.json"] == value
    assert list(yaml.safe_load_all(to_yaml([found, found]))) == [found, found]


@pytest.mark.parametrize("value", ["1e3", "9e12345678", "0x10", "0o7", "1_000", "12:30:45", ".5", "+1", "y", "N", "on"])
def test_text_that_another_reader_takes_for_a_number_or_truth_is_quoted(value: str):
    assert f'"{value}"' in to_yaml([{"a": value}])


def test_a_slot_that_is_none_or_empty_takes_its_key_away():
    found = template("service", name="x", labels={}, selector=None)
    assert found["metadata"] == {"name": "x"}
    assert "selector" not in found["spec"]


def test_false_and_zero_stay():
    found = template("jobset_spec", **dict.fromkeys(slots("jobset_spec"), 0) | {"suspend": False})
    assert found["suspend"] is False
    assert found["failurePolicy"]["maxRestarts"] == 0


def test_a_list_in_the_place_of_an_item_becomes_items():
    found = template(
        "network_policy", name="x", labels={}, selector={"a": "b"}, operator=[{"from": [1]}, {"from": [2]}]
    )
    assert found["spec"]["ingress"][1:] == [{"from": [1]}, {"from": [2]}]


def test_a_slot_without_a_value_is_our_own_mistake():
    with pytest.raises(KeyError, match="selector"):
        template("service", name="x", labels={})


def test_filling_leaves_the_template_as_it_was():
    first = template("service", name="a", labels={"x": "y"}, selector={"x": "y"})
    first["spec"]["clusterIP"] = "changed"
    assert template("service", name="b", labels={}, selector=None)["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("path", sorted(templates_dir().glob("*.yaml")), ids=lambda path: path.name)
def test_a_template_is_valid_yaml_whose_slots_are_whole_values(path: Path):
    for text in _texts(yaml.safe_load(path.read_text())):
        assert SLOT.fullmatch(text) or "${" not in text


@pytest.mark.parametrize("path", sorted(K8S.glob("[!o]*/*.yaml")), ids=lambda path: str(path.relative_to(K8S)))
def test_no_number_lives_outside_of_the_overlays(path: Path):
    leaves = [leaf for content in yaml.safe_load_all(path.read_text()) for leaf in _leaves(content)]
    assert [leaf for leaf in leaves if isinstance(leaf, int | float) and not isinstance(leaf, bool)] == []


def slots(name: str) -> set[str]:
    return set(re.findall(SLOT, (templates_dir() / f"{name}.yaml").read_text()))


def _leaves(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [leaf for value in node.values() for leaf in _leaves(value)]
    return [leaf for item in node for leaf in _leaves(item)] if isinstance(node, list) else [node]


def _texts(node: Any) -> list[str]:
    return [leaf for leaf in _leaves(node) if isinstance(leaf, str)]
