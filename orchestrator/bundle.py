"""The frozen bundle of a run: composed once by whoever submits it, loaded by every rank and attempt."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from orchestrator.compose import Composed
from orchestrator.config import MAY_CHANGE, RunConfig
from orchestrator.errors import ConfigError, UserError
from orchestrator.files import hash_file, read_json, write_json
from orchestrator.plain import from_dict, to_dict
from orchestrator.secrets import require_no_secrets

SCHEMA = 1
RECORDED_PACKAGES = (
    "torch", "torchvision", "pytorch-lightning", "hydra-core", "omegaconf", "webdataset", "timm", "wandb", "ray",
    "numpy", "pillow", "safetensors",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Initial:
    """The checkpoint that `init_from` meant when the run was frozen."""

    path: str
    weights_sha256: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """Everything that decides a run, and what it was made with."""

    run_id: str
    config: RunConfig
    config_hash: str
    overrides: tuple[str, ...]
    sources: dict[str, str]
    code_digest: str
    lock_digest: str | None
    versions: dict[str, str]
    git: dict[str, Any] | None
    machine: dict[str, Any]
    initial: Initial | None = None

    @property
    def folder(self) -> Path:
        """Of the run, on this machine. Raises ConfigError where runs are kept in an object store."""
        return folder_of_runs(self.config) / self.run_id


def folder_of_runs(config: RunConfig) -> Path:
    """`runs_dir` on this machine. Raises ConfigError where it is an object store."""
    place = config.runs_dir
    if "://" in place:
        rule = "is an object store, which keeps runs of cluster=kubernetes; what runs here needs a folder"
        raise ConfigError("runs_dir", place, rule, f"runs_dir=PATH checkpointing.mirror={place}")
    return Path(place)


def freeze(composed: Composed, initial: Initial | None = None) -> Bundle:
    """Freeze a composed config together with the identity of the code and its environment.

    `initial`: what the config's `init_from` means. Raises ConfigError where the config holds a secret.
    """
    plain = to_dict(composed.config)
    require_no_secrets(plain)
    return Bundle(
        run_id=run_id(composed.config, initial),
        config=composed.config,
        config_hash=_hash_json(plain),
        overrides=composed.overrides,
        sources=composed.sources,
        **_made_with(),
        initial=initial,
    )


def renew(bundle: Bundle) -> Bundle:
    """The same run with the code, packages and machine of now."""
    return replace(bundle, **_made_with())


def _made_with() -> dict[str, Any]:
    code = Path(__file__).parent
    lock = code.parent / "requirements.lock"
    return {
        "code_digest": imported_code(),
        "lock_digest": hash_file(lock) if lock.is_file() else None,
        "versions": _versions(),
        "git": _git_state(code.parent),
        "machine": {"system": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()},
    }


def with_config(bundle: Bundle, config: RunConfig) -> Bundle:
    """The same bundle of another config, with the id and hash that follow from it."""
    changed = {"run_id": run_id(config, bundle.initial), "config_hash": _hash_json(to_dict(config))}
    return replace(bundle, config=config, **changed)


def run_id(config: RunConfig, initial: Initial | None = None) -> str:
    """``name-XXXXXXXX`` from the content of the config without the keys that may change between attempts.

    Of `initial` the weights count, not their place.
    """
    plain = to_dict(config)
    if initial is not None:
        plain["init_from"] = initial.weights_sha256
    for split in ("train", "val"):
        plain["data"][split] = plain["data"][split].removeprefix(f"{config.data_dir}/")
    for key in MAY_CHANGE:
        *path, last = key.split(".")
        node = plain
        for part in path:
            node = node[part]
        node.pop(last)
    return f"{config.name}-{_hash_json(plain)[:8]}"


def write_bundle(bundle: Bundle, path: Path, data: Mapping[str, Any]) -> None:
    """Write ``run.json`` atomically; `data` identifies the shard sets by split."""
    write_json(path, content_of(bundle, data))


def content_of(bundle: Bundle, data: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.json`` holds, as plain JSON values."""
    facts = {**asdict(bundle), "overrides": list(bundle.overrides), "config": to_dict(bundle.config)}
    return {"schema": SCHEMA, "name": bundle.config.name, **facts, "data": dict(data)}


def load_bundle(path: Path) -> Bundle:
    """Read ``run.json``; the config is checked again and must still have its hash."""
    content = read_json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema}, this version reads {SCHEMA}. Way out: submit again")
    names = [field.name for field in fields(Bundle)]
    missing = [name for name in names if name not in content]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}. Way out: submit again, or restore the file")
    config = from_dict(content["config"])
    if _hash_json(to_dict(config)) != content["config_hash"]:
        raise UserError(f"{path} was edited: its config no longer has the hash {content['config_hash'][:12]}. "
                        "Way out: give the change as key=value to a new run")  # fmt: skip
    facts = {name: content[name] for name in names}
    initial = Initial(**content["initial"]) if content["initial"] else None
    return Bundle(**{**facts, "config": config, "overrides": tuple(content["overrides"]), "initial": initial})


def _hash_json(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def imported_code() -> str:
    """sha256 over names and bytes of the sources of the package that this process imported."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return versions


def _git_state(folder: Path) -> dict[str, Any] | None:
    if not (folder / ".git").exists():
        return None
    try:
        commit, branch, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True
            )
            for arguments in (("rev-parse", "HEAD"), ("rev-parse", "--abbrev-ref", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "branch": branch.stdout.strip(), "dirty": bool(changes.stdout.strip())}
