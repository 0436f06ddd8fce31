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


NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
ALONE = World(0, 1, 0, 1, "127.0.0.1", 0, 0)


def read_world(env: Mapping[str, str] = os.environ) -> World:
    """The world that a launcher with torchrun semantics describes; alone where there is none."""
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return ALONE
    wrong = [f"{name}={env.get(name, '(missing)')}" for name in NUMBERS if not env.get(name, "").isdecimal()]
    wrong += [] if env.get("MASTER_ADDR") else ["MASTER_ADDR=(missing)"]
    if wrong:
        raise _refusal(f"{', '.join(wrong)}, and each must be set, the numbers from 0 up")
    rank, world_size, local_rank, local_world_size, master_port = (int(env[name]) for name in NUMBERS)
    if rank >= world_size or local_rank >= local_world_size:
        raise _refusal(f"rank {rank} of {world_size}, local rank {local_rank} of {local_world_size}")
    return World(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=env["MASTER_ADDR"],
        master_port=master_port,
        attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def _refusal(what: str) -> UserError:
    return UserError(
        f"the launcher's environment says {what}. "
        "Way out: start with `orchestrator train` or torchrun, or unset RANK and WORLD_SIZE"
    )
