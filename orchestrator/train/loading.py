"""A network ready to evaluate or predict, from a checkpoint of ours or from a weights file with its config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from orchestrator.compose import Composed, overlay
from orchestrator.config import ModelConfig, RunConfig
from orchestrator.data.transforms import Preprocessing, preprocessing_of
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.files import read_json
from orchestrator.model.weights import load_weights
from orchestrator.model.zoo import build_model, imagenet_names
from orchestrator.options import Where
from orchestrator.plain import from_dict, to_dict
from orchestrator.train import checkpoint
from orchestrator.train.retention import best

IMAGENET_CLASSES = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """Where a network comes from: the checkpoint `folder`, else the file `config.model.weights`."""

    folder: Path | None
    config: RunConfig
    classes: tuple[str, ...] | None
    """None: the shards name them."""
    identity: str
    """Hash of the weights, or the path of the file."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A network in evaluation mode with its weights."""

    net: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def find_checkpoint(text: str, runs_dir: Path, key: str = "checkpoint") -> Path:
    """The path behind ``PATH``, ``ID``, ``ID:best`` or ``ID:last``; `key` is what it was given for."""
    run_id, _, which = text.rpartition(":") if text.endswith((":best", ":last")) else (text, "", "best")
    root = runs_dir / run_id / "checkpoints"
    if Path(text).exists() and not (Path(text) / "checkpoints").is_dir():
        return Path(text)
    if Path(text, "checkpoints").is_dir():
        root = Path(text, "checkpoints")
    if not root.is_dir():
        known = sorted(path.parent.name for path in runs_dir.glob("*/checkpoints"))
        raise ConfigError(
            key, text, f"is no path and no run in {runs_dir}/", f"runs there: {', '.join(known) or 'none'}"
        )
    found = checkpoint.newest(root) if which == "last" else best(root) or checkpoint.newest(root)
    if found is None:
        raise CheckpointError(f"run {run_id} has no whole checkpoint yet. Way out: train it, or name another run")
    return found.folder


def open_source(path: Path, composed: Composed) -> Source:
    """Join what the checkpoint fixes with what the command line may choose.

    Model and preprocessing come from the checkpoint; only keys that were typed out replace them. A weights file says
    nothing about either, so both must be chosen on the command line.
    """
    if path.is_dir():
        return _from_checkpoint(path, composed)
    return _from_file(path, composed)


def _from_checkpoint(path: Path, composed: Composed) -> Source:
    found = checkpoint.open_checkpoint(path)
    manifest = found.manifest
    record = path.parent.parent / "run.json"
    frozen = read_json(record)["config"] if record.exists() else to_dict(composed.config)
    plain = overlay(frozen, composed)
    # where the run was trained and kept says nothing of what is made of its checkpoint here
    if plain["cluster"]["where"] == Where.kubernetes.name:
        plain["cluster"] = to_dict(composed.config)["cluster"]
    if "://" in plain["runs_dir"]:
        plain["runs_dir"] = composed.config.runs_dir
    typed = composed.typed_keys()
    _require_same_model(path, manifest["model"], composed, typed)
    plain["model"] = {**manifest["model"], "weights": None}
    stored = {key: value for key, value in manifest["preprocessing"].items() if f"data.{key}" not in typed}
    plain["data"] = {**plain["data"], **stored}
    return Source(path, from_dict(plain), tuple(manifest["classes"]), manifest["weights_sha256"])


def _require_same_model(path: Path, stored: dict[str, Any], composed: Composed, typed: set[str]) -> None:
    """What the command line says of the model must be what the checkpoint holds."""
    asked = to_dict(composed.config.model)
    keys = [key.partition(".")[2] for key in typed if key.startswith("model.")]
    for key in [*(("name", "stem", "shortcut") if "model" in typed else ()), *sorted(keys)]:
        if asked[key] != stored[key]:
            rule = f"{path} holds a model with {key} = {stored[key]}"
            raise ConfigError(f"model.{key}", asked[key], rule, "leave model out, or name another checkpoint")


def _from_file(path: Path, composed: Composed) -> Source:
    typed = composed.typed_keys()
    if not any(key == "model" or key.startswith("model.name") for key in typed):
        raise ConfigError("checkpoint", path, "holds weights without their model", "add model=... or model.name=...")
    if not any(key == "data" or key.startswith("data.") for key in typed):
        way_out = "add data=... or data.image_size, data.eval_resize, data.mean, data.std, data.interpolation"
        raise ConfigError("checkpoint", path, "holds weights without their preprocessing", way_out)
    plain = to_dict(composed.config)
    plain["model"]["weights"] = str(path)
    return Source(None, from_dict(plain), None, str(path.resolve()))


def load(source: Source, classes: Sequence[str] | None) -> Loaded:
    """Build the network and load its weights. `classes` of the shards name the outputs where the source does not."""
    names = source.classes or tuple(classes or _names_of_head(source.config.model))
    net = build_model(source.config.model, len(names))
    if source.folder is not None:
        _load_checkpoint(source.folder, net)
    else:
        load_weights(str(source.config.model.weights), net)
    return Loaded(net.eval(), names, preprocessing_of(source.config.data))


def _load_checkpoint(folder: Path, net: nn.Module) -> None:
    weights = checkpoint.read_checkpoint(folder).load_weights()
    checkpoint.fill(net, weights, folder, "use the version that wrote it, or another checkpoint")


def _names_of_head(model: ModelConfig) -> list[str]:
    if model.num_classes is None:
        raise ConfigError("model.num_classes", None, "is not known without shards", "e.g. model.num_classes=1000")
    if model.num_classes == IMAGENET_CLASSES:
        return imagenet_names()
    return [str(number) for number in range(model.num_classes)]
