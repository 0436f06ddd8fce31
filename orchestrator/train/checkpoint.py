"""Checkpoints: a folder of tensors with a manifest of their hashes, complete or absent, verified before it is used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from orchestrator.errors import CheckpointError, gist
from orchestrator.files import hash_file, write_json
from orchestrator.train.state import TrainState, hash_state, hash_tensors

__all__ = ["Checkpoint", "TrainState", "hash_state", "hash_tensors", "newest", "open_checkpoint", "read_checkpoint"]
log = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST = "manifest.json"
MODEL = "model.safetensors"
EMA = "ema.safetensors"
OPTIMIZER = "optimizer.pt"
LATEST = "latest.json"
FIELDS = {"step": int, "metrics": dict, "weights_sha256": str, "state_sha256": str, "files": dict}
"""What every manifest says, by type."""
OTHER_CHECKPOINT = "Way out: use another checkpoint; ID:last takes the newest whole one"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk whose files have the hashes of its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def load_state(self) -> TrainState:
        """All tensors, on the CPU. Raises CheckpointError where a file holds something else."""
        optimizer = load_plain(self.folder / OPTIMIZER)
        ema = load_tensors(self.folder / EMA) if EMA in self.manifest["files"] else None
        if not isinstance(optimizer, dict) or not {"optimizer", "scaler"} <= set(optimizer):
            raise CheckpointError(f"{self.folder / OPTIMIZER} holds no optimizer and scaler. {OTHER_CHECKPOINT}")
        return TrainState(load_tensors(self.folder / MODEL), ema, optimizer["optimizer"], optimizer["scaler"])

    def load_weights(self) -> dict[str, torch.Tensor]:
        """What evaluation uses: the moving average where the run kept one, else the model."""
        if EMA not in self.manifest["files"]:
            return load_tensors(self.folder / MODEL)
        averaged = load_tensors(self.folder / EMA)
        return {name.removeprefix("module."): averaged[name] for name in averaged if name.startswith("module.")}


def step_folder(step: int) -> str:
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    return f"rank_{rank}.pt"


def hash_manifest(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest's content without its own hash, so that a flipped bit in a number is found too."""
    content = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file. Raises CheckpointError where it is none."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} holds no tensors ({gist(error)}). {OTHER_CHECKPOINT}") from None


def load_plain(path: Path) -> Any:
    """What torch.save wrote, of tensors and plain values only: no code runs, nothing compressed is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        size = path.stat().st_size
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
            raise CheckpointError(f"{path} would grow when it is unpacked, as none of ours does. {OTHER_CHECKPOINT}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes fail in an unpickler in any way there is
        why = "more than tensors and plain values, or not whole"
        raise CheckpointError(f"{path} is not read: it holds {why} ({gist(error)}). {OTHER_CHECKPOINT}") from None


def open_checkpoint(folder: Path, fields: Sequence[str] = ()) -> Checkpoint:
    """Read and verify one checkpoint, whose manifest must also have these `fields`.

    Raises CheckpointError that names the file at fault.
    """
    found = read_checkpoint(folder)
    lacking = [name for name in fields if name not in found.manifest]
    if lacking:
        raise CheckpointError(f"{folder / MANIFEST} lacks {', '.join(lacking)}. {OTHER_CHECKPOINT}")
    _require_complete(found)
    for name, facts in found.manifest["files"].items():
        _verify_file(folder / name, facts)
    return found


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the manifest alone, for a rank whose first one has verified the files."""
    path = folder / MANIFEST
    if not folder.is_dir():
        way_out = "name a folder such as runs/ID/checkpoints/step_00000120, or ID:best"
        raise CheckpointError(f"checkpoint {folder} does not exist. Way out: {way_out}")
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Way out: use another checkpoint") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path} is no manifest. {OTHER_CHECKPOINT}")
    if manifest.get("schema") != SCHEMA:
        found = f"has schema {manifest.get('schema')}, this version reads {SCHEMA}"
        raise CheckpointError(f"{folder} {found}. Way out: use the version that wrote it")
    _require_sound(path, manifest)
    return Checkpoint(folder, manifest)


def _require_sound(path: Path, manifest: dict[str, Any]) -> None:
    """Everything that a manifest must be by itself."""
    lacking = [name for name, kind in FIELDS.items() if not isinstance(manifest.get(name), kind)]
    if lacking:
        raise CheckpointError(f"{path} lacks {', '.join(lacking)}. {OTHER_CHECKPOINT}")
    if manifest.get("manifest_sha256") != hash_manifest(manifest):
        raise CheckpointError(f"{path} was damaged: its sha256 is not the one that it states. {OTHER_CHECKPOINT}")
    if path.parent.name.startswith("step_") and path.parent.name != step_folder(manifest["step"]):
        raise CheckpointError(f"{path} is of step {manifest['step']}, not of its folder's. {OTHER_CHECKPOINT}")
    for name, facts in manifest["files"].items():
        if name != Path(name).name or name in ("", ".", "..", MANIFEST) or "\\" in name or "\0" in name:
            raise CheckpointError(f"{path} names {name!r}, which is no file of its own folder. {OTHER_CHECKPOINT}")
        if not isinstance(facts, dict) or not {"sha256", "bytes"} <= set(facts):
            raise CheckpointError(f"{path} does not state size and sha256 of {name}. {OTHER_CHECKPOINT}")


def _require_complete(found: Checkpoint) -> None:
    ranks = [rank_file(rank) for rank in range(found.manifest.get("world_size", 0))]
    missing = [name for name in (MODEL, OPTIMIZER, *ranks) if name not in found.manifest["files"]]
    if missing:
        raise CheckpointError(f"{found.folder / MANIFEST} does not list {', '.join(missing)}. {OTHER_CHECKPOINT}")


def _verify_file(path: Path, facts: Mapping[str, Any]) -> None:
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link, and links are not followed here. {OTHER_CHECKPOINT}")
    size = path.stat().st_size if path.is_file() else None
    if size != facts["bytes"]:
        found = "is missing" if size is None else f"has {size} of {facts['bytes']} bytes"
        raise CheckpointError(f"{path} {found}. {OTHER_CHECKPOINT}")
    if hash_file(path) != facts["sha256"]:
        raise CheckpointError(f"{path} was damaged: its sha256 is not the manifest's. {OTHER_CHECKPOINT}")


def add_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Let a manifest say what an evaluation found after the checkpoint was sealed."""
    content = {**read_checkpoint(folder).manifest, "metrics": metrics}
    write_json(folder / MANIFEST, {**content, "manifest_sha256": hash_manifest(content)})


def fill(net: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path, way_out: str) -> None:
    """Load a checkpoint's tensors into a network. Raises CheckpointError where they are another network's."""
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        fault = str(error).splitlines()[1].strip()
        raise CheckpointError(f"{folder} holds another model: {fault}. Way out: {way_out}") from None


def newest(root: Path, fields: Sequence[str] = ()) -> Checkpoint | None:
    """The newest whole checkpoint of a run; damaged ones are passed over with a warning that names them.

    The folders themselves are looked at, so that a pointer which is torn or lies costs a warning only.
    """
    folders = sorted(root.glob("step_*"), reverse=True)
    for folder in folders:
        try:
            found = open_checkpoint(folder, fields)
        except CheckpointError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
            continue
        if folder == folders[0]:
            _warn_of_pointer(root, found)
        return found
    return None


def _warn_of_pointer(root: Path, found: Checkpoint) -> None:
    try:
        named = json.loads((root / LATEST).read_bytes())["folder"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); %s is the newest whole checkpoint", root / LATEST, error, found.folder)
        return
    if named != found.folder.name:
        log.warning("%s names %r; %s is the newest whole checkpoint", root / LATEST, named, found.folder)


def set_aside(root: Path, after: int) -> None:
    """Rename the checkpoints after a step: `newest` passed over them, and the run will write these steps again."""
    for folder in root.glob("step_*"):
        if folder.name > step_folder(after):
            aside = folder.with_name(f"damaged_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
