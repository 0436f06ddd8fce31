"""How a checkpoint comes onto the disk: each file synced and hashed as it is written, the manifest last, one rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from orchestrator.errors import NodeError
from orchestrator.files import disk_errors, sync_folder
from orchestrator.train.checkpoint import (
    EMA,
    LATEST,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    SCHEMA,
    hash_manifest,
    rank_file,
    step_folder,
)
from orchestrator.train.fence import Fence
from orchestrator.train.state import TrainState, bytes_of, hash_state, hash_tensors

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
"""Names of the safetensors format, by rising alignment."""
CHUNK = 1 << 20


class Sums:
    """A file that is written forward only, with the sha256 and the number of its bytes so far."""

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._digest, self.size = hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        """All of it, in pieces that leave room for other threads. A full disk is an OSError with its number."""
        view = memoryview(content).cast("B")
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            self._digest.update(piece)
            while piece:
                piece = piece[self._file.write(piece) :]
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """For torch.save; nothing is held back."""

    def close(self) -> None:
        self._file.close()

    def finish(self) -> dict[str, Any]:
        """Make it durable; returns what the manifest says of it."""
        os.fsync(self._file.fileno())
        return {"sha256": self._digest.hexdigest(), "bytes": self.size}


def write_checkpoint(fence: Fence, state: TrainState, ranks: Iterable[bytes], manifest: Mapping[str, Any]) -> Path:
    """Write ``step_N`` whole or not at all, then point to it.

    `state` lies on the CPU, `ranks` holds the content of each ``rank_N.pt``, `manifest` says `step` and whatever else
    a reader needs. Raises NodeError on a full disk, CheckpointError where a newer attempt has the folder.
    """
    root, step = fence.root, manifest["step"]
    with disk_errors(root), _unfit(root), fence.holding():
        made = fence.make(step_folder(step))
        try:
            _write_into(made, state, ranks, manifest)
            fence.put(made, root / made.name)
        finally:
            shutil.rmtree(made, ignore_errors=True)  # half of it would keep a full disk full
        point_to(fence, step)
    return root / made.name


@contextmanager
def _unfit(root: Path) -> Iterator[None]:
    """A disk that was written to and now refuses is the node's fault, not the user's."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EIO, errno.ESTALE):
            raise
        raise NodeError(
            f"{root}: cannot be written any more ({error.strerror}). Way out: mend the disk, or go on from another "
            "node; the checkpoints before this one are untouched"
        ) from error


def _write_into(folder: Path, state: TrainState, ranks: Iterable[bytes], manifest: Mapping[str, Any]) -> None:
    files = _write_files(folder, state, ranks)
    weights = hash_tensors(state.model)
    hashes = {"weights_sha256": weights, "state_sha256": hash_state(state, manifest["step"], weights)}
    content = {"schema": SCHEMA, **manifest, **hashes, "files": files}
    _write_json(folder / MANIFEST, {**content, "manifest_sha256": hash_manifest(content)})
    sync_folder(folder)


def point_to(fence: Fence, step: int) -> None:
    """Let ``latest.json`` name a checkpoint."""
    pointer = fence.folder / LATEST
    with fence.holding():
        _write_json(pointer, {"schema": SCHEMA, "step": step, "folder": step_folder(step)})
        os.replace(pointer, fence.root / LATEST)
        sync_folder(fence.root)


def _write_files(folder: Path, state: TrainState, ranks: Iterable[bytes]) -> dict[str, Any]:
    files = {}
    with _open(folder / MODEL, files) as file:
        write_safetensors(file, state.model)
    if state.ema is not None:
        with _open(folder / EMA, files) as file:
            write_safetensors(file, state.ema)
    with _open(folder / OPTIMIZER, files) as file:
        torch.save({"optimizer": state.optimizer, "scaler": state.scaler}, cast("Any", file))
    for rank, content in enumerate(ranks):
        with _open(folder / rank_file(rank), files) as file:
            file.write(content)
    return dict(sorted(files.items()))


@contextmanager
def _open(path: Path, files: dict[str, Any]) -> Iterator[Sums]:
    file = Sums(path)
    try:
        yield file
        files[path.name] = file.finish()
    finally:
        file.close()


def write_safetensors(file: Sums, tensors: Mapping[str, torch.Tensor]) -> None:
    """The bytes that the safetensors library writes, without its copy of everything in memory.

    Format: https://github.com/huggingface/safetensors#format
    """
    order = list(DTYPES)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    header, offset = {}, 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(bytes_of(tensors[name].detach()))


def _write_json(path: Path, value: Any) -> None:
    with _open(path, {}) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
