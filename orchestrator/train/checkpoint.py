"""Checkpoints: a folder of tensors with a manifest of their hashes, complete or absent, verified before it is used."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

from orchestrator.errors import CheckpointError
from orchestrator.files import disk_errors, hash_file, sync_folder, write_json

log = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST = "manifest.json"
MODEL = "model.safetensors"
EMA = "ema.safetensors"
OPTIMIZER = "optimizer.pt"
LATEST = "latest.json"
OTHER_CHECKPOINT = "Way out: use another checkpoint; ID:last takes the newest whole one"


@dataclass(slots=True)
class TrainState:
    """The tensors of a run between two steps."""

    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk whose files have the hashes of its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def load_state(self) -> TrainState:
        """All tensors, on the CPU."""
        optimizer = torch.load(self.folder / OPTIMIZER, map_location="cpu", weights_only=True)
        ema = load_file(self.folder / EMA) if EMA in self.manifest["files"] else None
        return TrainState(load_file(self.folder / MODEL), ema, optimizer["optimizer"], optimizer["scaler"])

    def load_weights(self) -> dict[str, torch.Tensor]:
        """What evaluation uses: the moving average where the run kept one, else the model."""
        if EMA not in self.manifest["files"]:
            return load_file(self.folder / MODEL)
        averaged = load_file(self.folder / EMA)
        return {name.removeprefix("module."): averaged[name] for name in averaged if name.startswith("module.")}


def step_folder(step: int) -> str:
    return f"step_{step:08d}"


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of each tensor in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


def save(root: Path, state: TrainState, manifest: dict[str, Any]) -> Path:
    """Write ``root/step_N`` on all ranks together: each its own file, the first one the rest, then one rename.

    `manifest` holds `step` and whatever else a reader needs; hashes are added here. Raises NodeError on a full disk.
    """
    final = root / step_folder(manifest["step"])
    temporary = root / f".{final.name}.tmp"
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with disk_errors(root):
        if rank == 0:
            _remove_leftovers(root)
            temporary.mkdir(parents=True)
        _barrier()
        _write_tensors(temporary / f"rank_{rank}.pt", _rank_state(rank, world_size))
        if rank == 0:
            _write_shared(temporary, state)
        _barrier()
        if rank == 0:
            _seal(temporary, final, {**manifest, **_hashes(state, manifest["step"])})
    return final


def _rank_state(rank: int, world_size: int) -> dict[str, Any]:
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


def _write_shared(folder: Path, state: TrainState) -> None:
    _write_safetensors(folder / MODEL, state.model)
    if state.ema is not None:
        _write_safetensors(folder / EMA, state.ema)
    _write_tensors(folder / OPTIMIZER, {"optimizer": state.optimizer, "scaler": state.scaler})


def _write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    _write(path, safetensors_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _write_tensors(path: Path, value: Any) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    _write(path, buffer.getbuffer())


def _write(path: Path, content: bytes | memoryview) -> None:
    """Through Python's own file: a full disk then is an OSError with its number, not a library's message."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _hashes(state: TrainState, step: int) -> dict[str, str]:
    weights = hash_tensors(state.model)
    return {"weights_sha256": weights, "state_sha256": hash_state(state, step, weights)}


def _seal(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    files = {
        path.name: {"sha256": hash_file(path), "bytes": path.stat().st_size} for path in sorted(temporary.iterdir())
    }
    write_json(temporary / MANIFEST, {"schema": SCHEMA, **manifest, "files": files})
    sync_folder(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync_folder(final.parent)
    write_json(final.parent / LATEST, {"schema": SCHEMA, "step": manifest["step"], "folder": final.name})


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _remove_leftovers(root: Path) -> None:
    for path in root.glob(".step_*.tmp"):
        shutil.rmtree(path)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises CheckpointError that names the file at fault."""
    found = read_checkpoint(folder)
    for name, facts in found.manifest["files"].items():
        _verify_file(folder / name, facts)
    return found


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the manifest alone, for a rank whose first one has verified the files."""
    if not folder.is_dir():
        way_out = "name a folder such as runs/ID/checkpoints/step_00000120, or ID:best"
        raise CheckpointError(f"checkpoint {folder} does not exist. Way out: {way_out}")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} cannot be read ({error}). Way out: use another checkpoint"
        ) from None
    if manifest.get("schema") != SCHEMA:
        found = f"has schema {manifest.get('schema')}, this version reads {SCHEMA}"
        raise CheckpointError(f"{folder} {found}. Way out: use the version that wrote it")
    return Checkpoint(folder, manifest)


def _verify_file(path: Path, facts: Mapping[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != facts["bytes"]:
        found = "is missing" if size is None else f"has {size} of {facts['bytes']} bytes"
        raise CheckpointError(f"{path} {found}. {OTHER_CHECKPOINT}")
    if hash_file(path) != facts["sha256"]:
        raise CheckpointError(f"{path} was damaged: its sha256 is not the manifest's. {OTHER_CHECKPOINT}")


def fill(net: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path, way_out: str) -> None:
    """Load a checkpoint's tensors into a network. Raises CheckpointError where they are another network's."""
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        fault = str(error).splitlines()[1].strip()
        raise CheckpointError(f"{folder} holds another model: {fault}. Way out: {way_out}") from None


def newest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run; damaged ones are passed over with a warning that names them."""
    for folder in sorted(root.glob("step_*"), reverse=True):
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
    return None


def set_aside(root: Path, after: int) -> None:
    """Rename the checkpoints after a step: `newest` passed over them, and the run will write these steps again."""
    for folder in root.glob("step_*"):
        if folder.name > step_folder(after):
            aside = folder.with_name(f"damaged_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)


def best(root: Path, metric: str = "val/acc1") -> Checkpoint | None:
    """The whole checkpoint with the greatest metric, the newest of equals."""
    folder = best_folder(root, metric)
    return open_checkpoint(folder) if folder else None


def best_folder(root: Path, metric: str = "val/acc1") -> Path | None:
    """Where `best` lies, without verifying it."""
    scored = []
    for folder in root.glob("step_*"):
        with suppress(CheckpointError):
            metrics = read_checkpoint(folder).manifest.get("metrics", {})
            if metric in metrics:
                scored.append((metrics[metric]["value"], folder.name, folder))
    return max(scored)[2] if scored else None


def prune(root: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` and the best."""
    kept = set(sorted(root.glob("step_*"))[-keep_last:]) | {best_folder(root)}
    for folder in set(root.glob("step_*")) - kept:
        doomed = folder.with_name(f".{folder.name}.tmp")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
