"""Start a model from a file of weights: by name where the names agree, in order where the shapes do."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from orchestrator.errors import CheckpointError, gist

State = dict[str, Tensor]
T = TypeVar("T")

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin")
WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "ema")
"""Keys under which training scripts put the weights, in the order in which they are looked for."""
PREFIXES = ("module.", "model.", "net.", "_orig_mod.")
COUNTERS = ("num_batches_tracked", "n_averaged")
ROLES = {"weight", "bias", "running_mean", "running_var"}
SHOWN = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsNote:
    """How the weights of a file came into a model; `str()` gives one sentence."""

    path: str
    tensors: int
    """Tensors taken from the file, without BatchNorm's counters."""
    in_order: bool
    """The names differ: tensor by tensor in order, all shapes agreeing."""
    wrapper: str | None
    """Key of the file under which the weights lay."""
    prefix: str
    """Stripped from every name."""
    head_replaced: bool
    """The head of the file has another size: the model's own stays as it was."""

    def __str__(self) -> str:
        parts = [f"{self.tensors} tensors {'in order (the names differ)' if self.in_order else 'by name'}"]
        parts += [f"from its {self.wrapper!r}"] if self.wrapper else []
        parts += [f"without the prefix {self.prefix!r}"] if self.prefix else []
        parts += ["except the head, which has another size"] if self.head_replaced else []
        return f"weights of {self.path}: {', '.join(parts)}"


@dataclass(frozen=True, slots=True)
class _Source:
    """The tensors of a file."""

    path: Path
    state: State
    wrapper: str | None
    prefix: str


def load_weights(path: str | Path, model: nn.Module, *, replace_head: bool = False) -> WeightsNote:
    """Copy the weights of a file, or of a checkpoint folder's model.safetensors, into `model`.

    With `replace_head` a head of another size in the file is left out. Nothing is copied when this raises.

    Raises:
        CheckpointError: missing, damaged or code-carrying file, or weights of another model.
    """
    own = model.state_dict()
    source = _read(Path(path).expanduser(), own)
    target = _without_counters(own)
    pairs, in_order = _pair(source, target)
    mismatched = [(theirs, ours) for theirs, ours in pairs if source.state[theirs].shape != target[ours].shape]
    head = _head_names(model)
    if mismatched and not {ours for _, ours in mismatched} <= head:
        raise CheckpointError(_other_model(source, target))
    if mismatched and not replace_head:
        raise CheckpointError(_other_head(source, target, mismatched[0]))
    skipped = head if mismatched else set()
    chosen = {ours: source.state[theirs] for theirs, ours in pairs if ours not in skipped}
    counters = {name: value for name, value in source.state.items() if name in own and name not in target}
    model.load_state_dict({**own, **counters, **chosen})
    return WeightsNote(
        path=str(path),
        tensors=len(chosen),
        in_order=in_order,
        wrapper=source.wrapper,
        prefix=source.prefix,
        head_replaced=bool(mismatched),
    )


def _without_counters(state: dict[str, T]) -> dict[str, T]:
    return {name: value for name, value in state.items() if not name.endswith(COUNTERS)}


def _pair(source: _Source, target: State) -> tuple[list[tuple[str, str]], bool]:
    """Names in the file beside names in the model, and whether they were paired in order; shapes may still differ."""
    names = list(_without_counters(source.state))
    if set(names) == set(target):
        return [(name, name) for name in target], False
    pairs = list(zip(names, target, strict=False))
    # safetensors sorts by name, so that the file's order says nothing about the network's.
    sorted_file = source.path.suffix == ".safetensors"
    if sorted_file or len(names) != len(target) or not all(_roles_agree(*pair) for pair in pairs):
        raise CheckpointError(_other_model(source, target))
    return pairs, True


def _roles_agree(theirs: str, ours: str) -> bool:
    """False where one is, say, a BatchNorm's weight and the other its running mean, which have the same shape."""
    a, b = theirs.rpartition(".")[2], ours.rpartition(".")[2]
    return a == b or not {a, b} <= ROLES


def _head_names(model: nn.Module) -> set[str]:
    """Names of the classifier's tensors: the model's last linear layer, or what timm calls the classifier."""
    classifier = getattr(model, "get_classifier", None)
    head = classifier() if callable(classifier) else None
    if not isinstance(head, nn.Module):
        head = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    inside = set() if head is None else {id(p) for p in head.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in inside}


def _other_head(source: _Source, target: State, pair: tuple[str, str]) -> str:
    theirs, ours = source.state[pair[0]].shape[0], target[pair[1]].shape[0]
    return (
        f"{source.path}: its head {pair[0]} has {theirs} classes, the model's has {ours}. "
        f"Way out: model.num_classes={theirs} keeps that head; training other classes needs a new one"
    )


def _other_model(source: _Source, target: State) -> str:
    state = _without_counters(source.state)
    differing = _differences(state, target)
    shown = "\n  ".join(differing[:SHOWN])
    more = f"\n  ... {len(differing)} in all" if len(differing) > SHOWN else ""
    order = "; safetensors files are matched by name only" if source.path.suffix == ".safetensors" else ""
    return (
        f"{source.path}: checkpoint of another model: the file has {len(state)} tensors with "
        f"{_count(state)} values, the model {len(target)} with {_count(target)}{order}. First differences:\n  "
        f"{shown}{more}\nWay out: give model.name and its options as the file was trained with, or another file"
    )


def _count(state: State) -> str:
    return f"{sum(value.numel() for value in state.values()):,}"


def _differences(state: State, target: State) -> list[str]:
    """By name where any name is common, else by position."""
    if set(state) & set(target):
        names = [*target, *(name for name in state if name not in target)]
        pairs = [(name if name in state else None, name if name in target else None) for name in names]
    else:
        pairs = list(zip_longest(state, target))
    differing = [pair for pair in pairs if not _alike(state, target, pair)]
    return [f"file {_describe(state, theirs)}, model {_describe(target, ours)}" for theirs, ours in differing or pairs]


def _alike(state: State, target: State, pair: tuple[str | None, str | None]) -> bool:
    theirs, ours = pair
    if theirs is None or ours is None:
        return False
    return state[theirs].shape == target[ours].shape and _roles_agree(theirs, ours)


def _describe(state: State, name: str | None) -> str:
    if name is None:
        return "has none"
    return f"{name} {'x'.join(map(str, state[name].shape)) or 'scalar'}"


def _read(path: Path, own: State) -> _Source:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file. Way out: a local .safetensors, .pt, .pth, .th or .bin file")
    if file.suffix == ".safetensors":
        content = _read_safetensors(file)
    elif file.suffix in TORCH_SUFFIXES:
        content = _read_torch(file)
    else:
        raise CheckpointError(
            f"{file}: unknown kind of file {file.suffix!r}. Way out: .safetensors, {', '.join(TORCH_SUFFIXES)}"
        )
    content, wrapper = _unwrap(content)
    prefix, state = _strip_prefixes(_require_state(file, content), own)
    return _Source(file, state, wrapper, prefix)


def _read_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(_damaged(file, gist(error))) from error


def _read_torch(file: Path) -> Any:
    """Tensors and plain values only: a pickle that would run code is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    # Damaged bytes fail in the unpickler in any way there is; its own text advises to run the code in the file.
    except Exception as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(_not_plain(file, f"it needs {named[1]}, and")) from error
        if "TorchScript" in str(error):
            raise CheckpointError(_not_plain(file, "it is a TorchScript program, and")) from error
        detail = "no pickle of torch.save" if isinstance(error, pickle.UnpicklingError) else gist(error)
        raise CheckpointError(_damaged(file, detail)) from error


def _not_plain(file: Path, why: str) -> str:
    return (
        f"{file}: holds more than tensors: {why} code from a file is never run. "
        f"Way out: in the program that wrote it, torch.save(model.state_dict(), ...) or safetensors"
    )


def _damaged(file: Path, detail: str) -> str:
    size = file.stat().st_size
    return f"{file}: truncated or damaged ({size} bytes; {detail}). Way out: copy or download it again"


def _unwrap(content: Any) -> tuple[Any, str | None]:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return content[key], key
    return content, None


def _require_state(file: Path, content: Any) -> State:
    tensors = isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())
    if tensors and content:
        return {str(name): value for name, value in content.items()}
    kind = f"a mapping with {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else ""
    raise CheckpointError(
        f"{file}: not a state dict but {kind or type(content).__name__}. "
        f"Way out: a file of named tensors, bare or under one of {', '.join(WRAPPERS)}"
    )


def _strip_prefixes(state: State, own: Iterable[str]) -> tuple[str, State]:
    """Take off what every name starts with and wrappers are known to add, until the names are the model's own."""
    wanted = set(_without_counters(dict.fromkeys(own)))
    state = {name: value for name, value in state.items() if name != "n_averaged"}
    stripped = ""
    while state and set(_without_counters(state)) != wanted:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        stripped += prefix
    return stripped, state
