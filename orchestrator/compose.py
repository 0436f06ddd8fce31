"""Composition: overrides and the files of `conf/` become one typed config; the only importer of Hydra and OmegaConf."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from orchestrator.config import GROUPS, INF, RunConfig
from orchestrator.errors import ConfigError, UserError, nearest
from orchestrator.plain import from_dict, to_dict

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROOT_FILE = "config"
CHOICES = (*GROUPS, "experiment")
OVERRIDE = "override"
RESOLVER = re.compile(r"\$\{[\w.]+:")


@dataclass(frozen=True, slots=True)
class Composed:
    """A checked config, the overrides that made it, and per dotted key the file (or `override`) its value came from."""

    config: RunConfig
    overrides: tuple[str, ...]
    sources: dict[str, str]

    def typed_keys(self) -> set[str]:
        """Keys and groups that the command line names."""
        return {text.lstrip("+").split("=", 1)[0] for text in self.overrides}


def overlay(frozen: Mapping[str, Any], composed: Composed) -> dict[str, Any]:
    """A frozen config in which only what the command line names is replaced: whole groups, then single keys."""
    plain, fresh, typed = deepcopy(dict(frozen)), to_dict(composed.config), composed.typed_keys()
    plain.update({group: fresh[group] for group in GROUPS if group in typed})
    for key in typed - set(CHOICES):
        *path, last = key.split(".")
        target, origin = plain, fresh
        for part in path:
            target, origin = target[part], origin[part]
        target[last] = origin[last]
    return plain


def conf_dir() -> Path:
    """The project's own `conf/`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Composed:
    """Compose and check the config of a run.

    Raises ConfigError for anything that a user can mistype: grammar, key, group, choice, type, rule.
    """
    search = [conf_dir(), *(_existing(folder) for folder in config_dirs)]
    _require_own_files(search)
    for override in _parse(overrides):
        _check_override(override, search)
    plain, sources = _compose_plain(list(overrides), search)
    composed = Composed(from_dict(plain), tuple(overrides), sources)
    _require_rate_of_optimizer(composed)
    return composed


def _require_rate_of_optimizer(composed: Composed) -> None:
    """A recipe's learning rate belongs to its own optimizer; under another one it would diverge in silence."""
    origin, optimizer = composed.sources["optimizer.lr"], composed.config.optimizer
    if "optimizer" in composed.typed_keys() and "recipe/" in origin:
        rule = f"would run with the optimizer.lr = {optimizer.lr:g} that {origin} sets for its own optimizer"
        raise ConfigError("optimizer", optimizer.kind.name, rule, "add optimizer.lr=..., or leave optimizer out")


def choices(group: str, search: Sequence[Path]) -> list[str]:
    """Names of a group's files, the user's own included."""
    return sorted({path.stem for folder in search for path in (folder / group).glob("*.yaml")} - {"defaults"})


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(
            "--config-dir", folder, "is not a folder", "name a folder with groups such as model/mine.yaml"
        )
    return folder.resolve()


def _require_own_files(search: Sequence[Path]) -> None:
    """The user's files hold mappings and have new names: of two files with one name, Hydra ignores one in silence."""
    for number, folder in enumerate(search[1:], start=1):
        for path in sorted(path for group in CHOICES for path in folder.glob(f"{group}/*.yaml")):
            name = path.relative_to(folder)
            taken = [earlier / name for earlier in search[:number] if (earlier / name).exists()]
            if taken:
                raise ConfigError("--config-dir", path, f"has the name of {taken[0]}", "give it another name")
            _load(path)


def _load(path: Path) -> DictConfig:
    from omegaconf import DictConfig, OmegaConf
    from yaml import YAMLError

    try:
        content = OmegaConf.load(path)
    except (YAMLError, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}. Way out: mend that place") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{path} holds a list. Way out: write key: value lines")
    return content


def _parse(overrides: Sequence[str]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            way_out = "write key=value; quote what the shell or Hydra would take apart: 'key=\"a b\"'"
            raise ConfigError("override", text, f"cannot be read ({reason})", way_out) from None
    return parsed


def _check_override(override: Any, search: Sequence[Path]) -> None:
    key = override.key_or_group
    if key not in CHOICES:
        _check_key(key, override.value())
    adds = override.is_add() or (override.is_force_add() and key in CHOICES)
    if adds or override.is_delete() or override.package is not None:
        raise ConfigError(key, override.input_line, "only key=value is taken", f"write {key}=VALUE")
    if RESOLVER.search(override.input_line):
        rule = "calls a resolver, and a run must not depend on the clock or the environment"
        raise ConfigError(key, override.input_line.partition("=")[2], rule, "write the value itself")
    if override.is_sweep_override():
        raise ConfigError(
            key,
            override.input_line.partition("=")[2],
            "names several values, and this command runs one",
            f"give {key} one value",
        )
    if key in CHOICES:
        _check_choice(key, override.value(), search)


def _check_choice(group: str, choice: Any, search: Sequence[Path]) -> None:
    known = choices(group, search)
    if choice not in known:
        raise ConfigError(group, choice, f"is no file of conf/{group}/", nearest(str(choice), known))


def _check_key(key: str, value: Any) -> None:
    kind: Any = RunConfig
    for part in key.split("."):
        hints = get_type_hints(kind) if is_dataclass(kind) else {}
        if part not in hints:
            way_out = f"{_nearest_key(key)} (orchestrator train --cfg lists all)"
            raise ConfigError(key, value, "is not a key of the config", way_out)
        kind = hints[part]


def _nearest_key(key: str) -> str:
    """The key that was meant: one of that name in some group (`lr`: `optimizer.lr`), else the nearest by spelling."""
    known, last = leaf_keys(), key.rpartition(".")[2]
    same_end = [name for name in known if name.endswith(f".{last}")]
    if same_end:
        return f"did you mean {' or '.join(map(repr, same_end))}?"
    return nearest(key, {*known, *CHOICES})


def leaf_keys(kind: Any = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for name, hint in get_type_hints(kind).items():
        plain = get_args(hint)[0] if isinstance(hint, UnionType) else hint
        keys += leaf_keys(plain, f"{prefix}{name}.") if is_dataclass(plain) else [prefix + name]
    return keys


def _compose_plain(overrides: list[str], search: Sequence[Path]) -> tuple[dict[str, Any], dict[str, str]]:
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    places = ",".join(_quote(f"file://{folder}") for folder in search[1:])
    extra = [f"hydra.searchpath=[{places}]"] if places else []
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(search[0]), version_base="1.3"):
            config = hydra.compose(ROOT_FILE, overrides=overrides + extra)
            loader = GlobalHydra.instance().config_loader()
            order = loader.compute_defaults_list(ROOT_FILE, overrides + extra, RunMode.RUN).defaults
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        way_out = f"give {error.full_key} a value of its own"
        raise ConfigError(str(error.full_key), "(unresolved)", str(error.msg).splitlines()[0], way_out) from None
    except HydraException as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"{' '.join(overrides)}: {reason}. Way out: mend that override or the file it names") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}, _sources(order, overrides, search)


def _quote(text: str) -> str:
    """As a string of Hydra's override grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _sources(order: Sequence[Any], overrides: Sequence[str], search: Sequence[Path]) -> dict[str, str]:
    """Dotted key → the file that had the last word, in the order in which Hydra merges files."""
    sources: dict[str, str] = {}
    for default in order:
        path = _file_of(default.config_path, search)
        if path is not None:
            shown = str(path) if search[0] not in path.parents else f"conf/{path.relative_to(search[0])}"
            prefix = f"{default.package}." if default.package else ""
            sources.update(dict.fromkeys(_keys_of(path, prefix), shown))
    typed = (text.lstrip("+").split("=", 1)[0] for text in overrides)
    sources.update({key: OVERRIDE for key in typed if key not in CHOICES})
    return sources


def _file_of(config_path: str | None, search: Sequence[Path]) -> Path | None:
    if config_path is None or config_path.startswith("hydra/"):
        return None
    found = (folder / f"{config_path}.yaml" for folder in search)
    return next((path for path in found if path.is_file()), None)


def _keys_of(path: Path, prefix: str) -> Iterator[str]:
    from omegaconf import OmegaConf

    content = _load(path)
    content.pop("defaults", None)
    yield from flatten(OmegaConf.to_container(content), prefix)  # pyright: ignore[reportArgumentType]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def render(composed: Composed) -> str:
    """The config as YAML, each value with the file it came from in a comment."""
    lines = list(_lines(to_dict(composed.config)))
    width = min(64, max(len(line) for line, _ in lines))
    sources = ((line, composed.sources.get(key)) for line, key in lines)
    return "\n".join(f"{line:<{width}}  # {source}" if source else line for line, source in sources)


def _lines(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """One line of YAML and one dotted key per value, so that a comment fits behind each."""
    from yaml import safe_dump

    indent = "  " * prefix.count(".")
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:", prefix + name
            yield from _lines(value, f"{prefix}{name}.")
        else:
            text = safe_dump(value, default_flow_style=True, allow_unicode=True, width=INF)
            text = text.removesuffix("...\n").rstrip()  # YAML's end mark behind a bare scalar
            yield f"{indent}{name}: {text}", prefix + name
