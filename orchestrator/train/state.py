"""The tensors of a run between two steps, their hashes, and the random states of a process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(slots=True)
class TrainState:
    """The tensors of a run between two steps."""

    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> TrainState:
        """The same state with each tensor replaced by ``change(key, tensor)``; keys are unique."""
        parts = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "scaler": self.scaler}
        return TrainState(**{name: map_tensors(value, change, name) for name, value in parts.items()})


def map_tensors(value: Any, change: Callable[[str, torch.Tensor], torch.Tensor], key: str = "") -> Any:
    """Copy mappings and lists, with each tensor in them replaced."""
    if isinstance(value, torch.Tensor):
        return change(key, value)
    if isinstance(value, Mapping):
        return {name: map_tensors(item, change, f"{key}/{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change, f"{key}/{number}") for number, item in enumerate(value))
    return value


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of each tensor in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU in the order of its elements, without a copy where they lie so."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def hash_state(state: TrainState, step: int, weights_sha256: str | None = None) -> str:
    """The same over model, moving average, optimizer and loss scale; schedule and random numbers follow from `step`.

    `weights_sha256`: the hash of the model where the caller has it already.
    """
    weights = weights_sha256 or hash_tensors(state.model)
    digest = hashlib.sha256(f"{step}\0{weights}\0{hash_tensors(state.ema or {})}".encode())
    for key, value in _leaves({"optimizer": state.optimizer, "scaler": state.scaler}):
        content = hash_tensors({key: value}) if isinstance(value, torch.Tensor) else repr(value)
        digest.update(f"\0{key}\0{content}".encode())
    return digest.hexdigest()


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield from _leaves(value[name], f"{key}/{name}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{key}/{number}")
    else:
        yield key, value


def random_states(rank: int, world_size: int) -> dict[str, Any]:
    """Random states of the process, for whoever draws from them against the rules of this project."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "rank": rank,
        "world_size": world_size,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [str(kind), torch.from_numpy(np.array(keys)), int(position), int(has_gauss), float(gauss)],  # pyright: ignore
        "python": list(random.getstate()[1]),
    }
