"""Which process of how many this is; the only reader of the launcher's environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import UserError


@dataclass(frozen=True, slots=True)
class World:
    """The place of a process in its group, as torchrun names it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    attempt: int
    """Starts of this group before the present one."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0


ALONE = World(0, 1, 0, 1, "127.0.0.1", 0, 0)


def read_world(env: Mapping[str, str] = os.environ) -> World:
    """The world that a launcher with torchrun semantics describes; alone where there is none."""
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return ALONE
    try:
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        return World(
            rank=rank,
            world_size=world_size,
            local_rank=int(env["LOCAL_RANK"]),
            local_world_size=int(env["LOCAL_WORLD_SIZE"]),
            master_addr=env["MASTER_ADDR"],
            master_port=int(env["MASTER_PORT"]),
            attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the launcher set RANK or WORLD_SIZE, but {error} is missing or no number. "
            "Way out: start with `orchestrator train` or torchrun, or unset both variables"
        ) from None
