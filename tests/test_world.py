"""The launcher's environment: taken as torchrun sets it, refused where it is half set or makes no sense."""

from __future__ import annotations

import pytest

from orchestrator.errors import UserError
from orchestrator.world import ALONE, World, read_world

ENV = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip


def test_a_process_without_a_launcher_is_alone() -> None:
    assert read_world({}) == ALONE
    assert read_world({"LOCAL_RANK": "3", "MASTER_PORT": "1"}) == ALONE
    assert ALONE.is_first
    assert ALONE.world_size == 1


def test_the_place_in_the_group_is_read_as_torchrun_sets_it() -> None:
    assert read_world(ENV) == World(5, 8, 1, 4, "node-0", 29500, 2)
    assert not read_world(ENV).is_first
    assert read_world({key: ENV[key] for key in ENV if key != "TORCHELASTIC_RESTART_COUNT"}).attempt == 0


@pytest.mark.parametrize("name", [name for name in ENV if name != "TORCHELASTIC_RESTART_COUNT"])
@pytest.mark.parametrize("value", [None, "", "x", "-1"])
def test_a_half_set_environment_is_refused_by_the_name_of_the_variable(name: str, value: str | None) -> None:
    value = None if name == "MASTER_ADDR" else value  # any text can be a host
    env = {key: text for key, text in (ENV | {name: value}).items() if text is not None}
    with pytest.raises(UserError, match=rf"{name}=.*Way out"):
        read_world(env)


@pytest.mark.parametrize("env", [{"RANK": "8"}, {"LOCAL_RANK": "4"}, {"WORLD_SIZE": "5"}, {"LOCAL_WORLD_SIZE": "1"}])
def test_a_rank_outside_its_world_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"rank .* of .*Way out"):
        read_world(ENV | env)
