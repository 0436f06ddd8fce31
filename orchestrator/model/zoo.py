"""A network by its name: our ResNets, then a package's entry point, then timm. Never a download."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from orchestrator.config import ModelConfig
from orchestrator.errors import ConfigError, nearest
from orchestrator.model.resnet import CIFAR_DEPTHS, IMAGENET_DEPTHS, ResNetOptions, cifar_resnet, resnet
from orchestrator.options import Shortcut, Stem

ENTRY_POINTS = "orchestrator.models"
TIMM = "timm/"

OURS: dict[str, Callable[[int, ResNetOptions], nn.Module]] = {
    **{f"resnet{depth}": partial(resnet, depth) for depth in IMAGENET_DEPTHS},
    **{f"cifar_resnet{depth}": partial(cifar_resnet, depth) for depth in CIFAR_DEPTHS},
}
TIMM_KNOBS = {"zero_init_last": "zero_init_last", "drop_path_rate": "drop_path", "drop_rate": "dropout"}
"""timm's names of our options."""
TELL_APART = {134: "crane (bird)", 517: "crane (machine)", 639: "maillot (tank suit)"}
"""ImageNet classes whose first synonym another class has too."""


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """A freshly initialised network with a head of `num_classes`; `config.weights` is left to `load_weights`.

    Raises:
        ConfigError: unknown name, or an option that the network does not have.
    """
    if config.name in OURS:
        return _build_ours(config, num_classes)
    packaged = _packaged()
    if config.name in packaged:
        return _build_packaged(packaged[config.name], config, num_classes)
    return _build_timm(config, num_classes)


def known_models() -> list[str]:
    """Every name that `build_model` takes; imports timm, which takes seconds."""
    return sorted({*OURS, *_packaged(), *_timm_names()})


def imagenet_names() -> list[str]:
    """The 1,000 classes of ImageNet-1k in the order of their indices, each by its first synonym."""
    _timm()
    from timm.data.imagenet_info import ImageNetInfo

    descriptions = ImageNetInfo("imagenet-1k").label_descriptions()
    return [TELL_APART.get(i, text.partition(",")[0].strip()) for i, text in enumerate(descriptions)]


def _packaged() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _timm() -> Any:
    # timm asks the hub for anything that it misses on disk; here a name stands for an architecture only.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import timm

    return timm


@cache
def _timm_names() -> tuple[str, ...]:
    return tuple(_timm().list_models())


def _refuse(key: str, value: object, rule: str, way_out: str) -> None:
    raise ConfigError(f"model.{key}", value, rule, way_out)


def _build_ours(config: ModelConfig, num_classes: int) -> nn.Module:
    if config.drop_path:
        _refuse(
            "drop_path",
            config.drop_path,
            f"our {config.name} has no stochastic depth",
            f"model.drop_path=0 or model.name={TIMM}{config.name.removeprefix('cifar_')}",
        )
    if config.name.startswith("cifar_") and config.stem is not Stem.small:
        _refuse(
            "stem",
            config.stem.value,
            f"{config.name} has a small stem, as published",
            f"model={config.name}, which sets it, or model.stem=small",
        )
    options = ResNetOptions(
        stem=config.stem,
        shortcut=config.shortcut,
        zero_init_last=config.zero_init_last,
        dropout=config.dropout,
    )
    return OURS[config.name](num_classes, options)


def _build_packaged(point: EntryPoint, config: ModelConfig, num_classes: int) -> nn.Module:
    """Call an entry point with `num_classes` and those of the options that its signature names."""
    try:
        build = point.load()
    except Exception as error:
        raise ConfigError(
            "model.name", config.name, f"its entry point {point.value} cannot be imported: {error}", "mend that package"
        ) from error
    options = _plain_options(config)
    parameters = inspect.signature(build).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        _refuse_unless_neutral(config, set(options) - set(parameters), f"the entry point {point.value}")
        options = {key: value for key, value in options.items() if key in parameters}
    model = build(num_classes=num_classes, **options)
    if not isinstance(model, nn.Module):
        _refuse(
            "name",
            config.name,
            f"{point.value} returned {type(model).__name__}, not a torch module",
            "mend that package",
        )
    return model


def _plain_options(config: ModelConfig) -> dict[str, Any]:
    return {
        "stem": config.stem.value,
        "shortcut": config.shortcut.value,
        "zero_init_last": config.zero_init_last,
        "drop_path": config.drop_path,
        "dropout": config.dropout,
    }


NEUTRAL = {"stem": Stem.imagenet.value, "shortcut": Shortcut.B.value, "drop_path": 0.0, "dropout": 0.0}
"""Values that ask for nothing. `zero_init_last` asks for nothing either where a network has no residual branch."""


def _refuse_unless_neutral(config: ModelConfig, absent: set[str], network: str) -> None:
    options = _plain_options(config)
    for key, neutral in NEUTRAL.items():
        if key in absent and options[key] != neutral:
            _refuse(key, options[key], f"{network} has no such option", f"model.{key}={neutral}")


def _build_timm(config: ModelConfig, num_classes: int) -> nn.Module:
    name = config.name.removeprefix(TIMM)
    _require_timm_name(config.name, name)
    _refuse_unless_neutral(config, {"stem", "shortcut"}, f"timm's {name}")
    # Zeros are passed as well: some of timm's models come with stochastic depth or dropout of their own.
    knobs = {knob: getattr(config, key) for knob, key in TIMM_KNOBS.items()}
    while True:
        try:
            return _timm().create_model(name, pretrained=False, num_classes=num_classes, **knobs)
        except TypeError as error:
            refused = [knob for knob in knobs if f"'{knob}'" in str(error) and "unexpected keyword" in str(error)]
            if not refused:
                raise
            # timm's constructors take different options, and only calling them tells.
            _refuse_unless_neutral(config, {TIMM_KNOBS[knob] for knob in refused}, f"timm's {name}")
            knobs = {knob: value for knob, value in knobs.items() if knob not in refused}


def _require_timm_name(typed: str, name: str) -> None:
    if name in _timm_names():
        return
    architecture, dot, _ = name.partition(".")
    if dot and architecture in _timm_names():
        _refuse(
            "name",
            typed,
            "what follows the dot names pretrained weights, which are never downloaded",
            f"model.name={TIMM}{architecture}, and model.weights=FILE to start from a file",
        )
    known = [TIMM + known for known in _timm_names()] if typed.startswith(TIMM) else known_models()
    close = difflib.get_close_matches(typed, known, n=1, cutoff=0.5)
    _refuse("name", typed, "no such model", f"{nearest(typed, close or OURS)} ({TIMM}NAME takes any of timm's)")
