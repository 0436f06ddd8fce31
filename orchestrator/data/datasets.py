"""Data sets that are programs: scikit-learn's digits, coloured stripes, torchvision's classes and a user's own."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.images import encode_image
from orchestrator.data.sources import ENTRY_POINTS, TORCHVISION, Item, Source, SourceOptions, split_by_hash
from orchestrator.errors import DataError, nearest

DIGITS_VAL_FRACTION = 0.2
VAL_FRACTION = 0.1
_SPLIT_NAMES = {
    "split": {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "test")},
    "version": {"train": ("2021_train",), "val": ("2021_valid",)},
}
"""By the argument that selects a split: what torchvision's classes call it, the first that they know."""
_SPLITTING = {"train", *_SPLIT_NAMES}


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 8, 8) uint8 from the stored 0..16, and labels."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target


def read_digit(ref: int) -> np.ndarray:
    return _digits()[0][ref]


def open_digits() -> Source:
    """A fixed split, so that figures of different seeds and users compare."""
    labels = _digits()[1]
    items = [Item(f"{i:04d}", int(label), i, 200, "digits") for i, label in enumerate(labels)]
    return Source("digits", tuple("0123456789"), split_by_hash(items, DIGITS_VAL_FRACTION, 0), read_digit)


@dataclass(frozen=True, slots=True)
class StripeReader:
    """Stripes whose direction and colour tell the class; phase, pitch and noise vary with the index."""

    classes: int
    size: int
    seed: int

    def __call__(self, ref: int) -> np.ndarray:
        random = np.random.Generator(np.random.Philox(key=[self.seed, ref]))
        share = (ref % self.classes) / self.classes
        y, x = np.mgrid[: self.size, : self.size] / self.size
        pitch, phase = random.uniform(3, 5), random.uniform(0, 2 * math.pi)
        along = x * math.cos(math.pi * share) + y * math.sin(math.pi * share)
        wave = 0.5 + 0.5 * np.sin(2 * math.pi * pitch * along + phase)
        hue = 0.5 + 0.5 * np.cos(2 * math.pi * (share + np.array([0.0, 1 / 3, 2 / 3])))
        noise = random.normal(0, 0.1, (self.size, self.size, 3))
        return np.clip(255 * (wave[..., None] * hue + noise), 0, 255).astype(np.uint8)


def open_synthetic(options: SourceOptions) -> Source:
    """`options.samples` images over both splits."""
    read = StripeReader(options.classes, options.size, options.seed)
    stamp = f"{options.classes}:{options.size}:{options.seed}"
    estimate = options.size * options.size * 3
    items = [Item(f"{i:07d}", i % options.classes, i, estimate, stamp) for i in range(options.samples)]
    classes = tuple(f"stripes_{i:0{len(str(options.classes - 1))}d}" for i in range(options.classes))
    return Source("synthetic", classes, split_by_hash(items, _fraction(options), options.seed), read)


def _fraction(options: SourceOptions) -> float:
    return VAL_FRACTION if options.val_fraction is None else options.val_fraction


@dataclass(frozen=True, slots=True)
class DatasetReader:
    """Items (split, index) of a data set that each packing process opens for itself; files by their path."""

    kind: str  # "torchvision" or "entry point"
    name: str
    root: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __call__(self, ref: tuple[str, int] | str) -> bytes | np.ndarray:
        if isinstance(ref, str):
            return Path(ref).read_bytes()
        split, index = ref
        return _to_picture(_opened(self, split)[index][0])


@lru_cache(maxsize=4)
def _opened(reader: DatasetReader, split: str) -> Any:
    if reader.kind == "torchvision":
        return _make_torchvision(reader.name, dict(reader.arguments), SourceOptions(root=reader.root), split)
    return _load_entry_point(reader.name)(split)


def _to_picture(image: Any) -> bytes | np.ndarray:
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes()
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return np.asarray(image)


def open_torchvision(words: str, options: SourceOptions) -> Source:
    """A torchvision class by name, if its items are (image, integer); `NAME key=value ...` gives it arguments.

    A split given so is the training split, from which validation is cut off, or both: `split=trainval,test`.
    """
    name, *rest = words.split() or [""]
    arguments = dict(_argument(name, word) for word in rest)
    root = str(Path(arguments.pop("root", options.root)).expanduser())
    options = replace(options, root=root)
    train = _make_torchvision(name, arguments, options, "train")
    val = None if train is None else _make_torchvision(name, arguments, options, "val")
    reader = DatasetReader("torchvision", name, root, tuple(arguments.items()))
    return _from_datasets(TORCHVISION + name, train, val, reader, options)


def _argument(name: str, word: str) -> tuple[str, Any]:
    """key=value, where integers, true and false are what they look like."""
    key, equals, value = word.partition("=")
    if not equals or not key.isidentifier():
        raise DataError(f"{TORCHVISION}{name}: {word} is not key=value. Way out: '{TORCHVISION}EMNIST split=letters'")
    if re.fullmatch(r"-?\d+", value):
        return key, int(value)
    return key, {"true": True, "false": False}.get(value.lower(), value)


def _make_torchvision(name: str, arguments: dict[str, Any], options: SourceOptions, split: str) -> Any:
    """None where the class has no such split."""
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if name not in datasets.__all__ or not inspect.isclass(kind):
        raise DataError(f"{TORCHVISION}{name}: torchvision has no such data set; {nearest(name, datasets.__all__)}")
    accepted = _accepted(kind)
    open_to_all = sorted(accepted - {"download", "loader", "is_valid_file", "extensions"})
    unknown = sorted(set(arguments) - set(open_to_all))
    if unknown:
        raise DataError(f"{TORCHVISION}{name}: it takes no {unknown[0]}=. Way out: {', '.join(open_to_all)}")
    given = {"root": options.root, "download": options.download, "loader": str} | arguments
    fixed = {key: value for key, value in given.items() if key in accepted - _SPLITTING}
    refused: ValueError | None = None
    for choice in _split_arguments(accepted, arguments, split):
        try:
            return kind(**fixed, **choice)
        except ValueError as error:  # no split of this name: try the next spelling
            refused = error
        except (RuntimeError, OSError, TypeError, ImportError) as error:
            raise DataError(
                f"{TORCHVISION}{name}: {error}. Way out: --root FOLDER where it lies, or --download"
            ) from error
    if refused and arguments:
        raise DataError(f"{TORCHVISION}{name}: {refused}. Way out: mend its arguments") from refused
    return None


def _accepted(kind: Any) -> set[str]:
    """The names of its arguments, with those that it passes on to the class it extends."""
    names: set[str] = set()
    for cls in kind.__mro__[:-1]:
        parameters = inspect.signature(cls).parameters
        names |= set(parameters)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            break
    return names - {"kwargs", "transform", "target_transform", "transforms"}


def _split_arguments(accepted: set[str], arguments: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """Which arguments may select this split; without one the data set is all training images."""
    chosen = {key: str(value).split(",") for key, value in arguments.items() if key in _SPLIT_NAMES}
    at = 0 if split == "train" else -1
    if "train" in accepted and "train" not in arguments:
        return [{"train": split == "train"} | {key: names[0] for key, names in chosen.items()}]
    if "train" in arguments or chosen:
        only = any(len(names) > 1 for names in chosen.values()) or split == "train"
        fixed = {key: value for key, value in arguments.items() if key == "train"}
        return [fixed | {key: names[at] for key, names in chosen.items()}] if only else []
    for argument, names in _SPLIT_NAMES.items():
        if argument in accepted:
            return [{argument: name} for name in names[split]]
    return [{}] if split == "train" else []


def entry_point_names() -> list[str]:
    return sorted(entry.name for entry in entry_points(group=ENTRY_POINTS))


def _load_entry_point(name: str) -> Any:
    (found, *_) = entry_points(group=ENTRY_POINTS, name=name)
    return found.load()


def open_entry_point(name: str, options: SourceOptions) -> Source:
    """What a package registers: a callable(split) that returns a sequence of (image, integer), or None for no split."""
    load = _load_entry_point(name)
    return _from_datasets(name, load("train"), load("val"), DatasetReader("entry point", name, ""), options)


def _from_datasets(name: str, train: Any, val: Any, read: DatasetReader, options: SourceOptions) -> Source:
    if train is None or not len(train):
        raise DataError(f"{name}: no training images. Way out: name a data set with a training split")
    splits = {"train": _items(name, train, "train"), "val": _items(name, val, "val") if val is not None else []}
    if not splits["val"]:
        splits = split_by_hash(splits["train"], _fraction(options), options.seed)
    highest = max(item.label for items in splits.values() for item in items)
    classes = getattr(train, "classes", None)
    if not classes or len(classes) <= highest:
        classes = range(highest + 1)
    return Source(name.replace(":", "-"), tuple(str(c) for c in classes), splits, read)


def _items(name: str, dataset: Any, split: str) -> list[Item]:
    labels = _labels(name, dataset)
    if isinstance(dataset[0][0], (str, Path)):
        return [_file_item(f"{split}/{i:07d}", label, (split, i), dataset[i][0]) for i, label in enumerate(labels)]
    picture = _to_picture(dataset[0][0])
    estimate = len(picture if isinstance(picture, bytes) else encode_image(picture, "PNG", 95))
    return [Item(f"{split}/{i:07d}", label, (split, i), estimate, name) for i, label in enumerate(labels)]


def _file_item(name: str, label: int, ref: tuple[str, int], image: Any) -> Item:
    """An image that is a file is read without the data set; an entry point may mix files and pictures."""
    if not isinstance(image, (str, Path)):
        return Item(name, label, ref, 0, name)
    path = os.path.abspath(image)
    if not os.path.exists(path):
        return Item(name, label, path, 0, name)
    stat = os.stat(path)
    return Item(name, label, path, stat.st_size, f"{stat.st_size}:{stat.st_mtime_ns}")


def _labels(name: str, dataset: Any) -> list[int]:
    """From the attribute in which torchvision keeps them, else by reading every item."""
    first = dataset[0]
    if not isinstance(first, tuple) or len(first) != 2 or not _is_picture(first[0]) or not _is_integer(first[1]):
        kinds = ", ".join(type(part).__name__ for part in first) if isinstance(first, tuple) else type(first).__name__
        raise DataError(f"{name}: items are ({kinds}), must be (image, integer). Way out: a classification data set")
    for attribute in ("targets", "labels", "_labels"):
        stored: Sequence[Any] | None = getattr(dataset, attribute, None)
        if stored is not None and len(stored) == len(dataset) and int(stored[0]) == int(first[1]):
            return [int(label) for label in stored]
    return [int(dataset[i][1]) for i in range(len(dataset))]


def _is_picture(value: Any) -> bool:
    return isinstance(value, (bytes, str, Path)) or hasattr(value, "convert")


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer))
