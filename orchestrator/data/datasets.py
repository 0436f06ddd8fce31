"""Data sets that are programs: scikit-learn's digits, coloured stripes, torchvision's classes and a user's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
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
_SPLIT_NAMES = {"train": ("train", "trainval"), "val": ("val", "test", "valid")}


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
    """Items (split, index) of a data set that each packing process opens for itself."""

    kind: str  # "torchvision" or "entry point"
    name: str
    root: str

    def __call__(self, ref: tuple[str, int]) -> bytes | np.ndarray:
        split, index = ref
        return _to_picture(_opened(self.kind, self.name, self.root, split)[index][0])


@lru_cache(maxsize=4)
def _opened(kind: str, name: str, root: str, split: str) -> Any:
    if kind == "torchvision":
        return _make_torchvision(name, SourceOptions(root=root), split)
    return _load_entry_point(name)(split)


def _to_picture(image: Any) -> bytes | np.ndarray:
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes()
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return np.asarray(image)


def open_torchvision(name: str, options: SourceOptions) -> Source:
    """A torchvision class by name, if its items are (image, integer)."""
    train = _make_torchvision(name, options, "train")
    val = None if train is None else _make_torchvision(name, options, "val")
    reader = DatasetReader("torchvision", name, options.root)
    return _from_datasets(TORCHVISION + name, train, val, reader, options)


def _make_torchvision(name: str, options: SourceOptions, split: str) -> Any:
    """None where the class has no such split."""
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if name not in datasets.__all__ or kind is None:
        raise DataError(f"{TORCHVISION}{name}: torchvision has no such data set; {nearest(name, datasets.__all__)}")
    accepted = inspect.signature(kind).parameters
    fixed: dict[str, Any] = {"root": options.root, "download": options.download}
    fixed = {key: value for key, value in fixed.items() if key in accepted}
    for choice in _split_arguments(accepted, split):
        try:
            return kind(**fixed, **choice)
        except ValueError:  # no split of this name: try the next spelling
            continue
        except (RuntimeError, OSError, TypeError) as error:
            raise DataError(
                f"{TORCHVISION}{name}: {error}. Way out: --root FOLDER where it lies, or --download"
            ) from error
    return None


def _split_arguments(accepted: Any, split: str) -> list[dict[str, Any]]:
    if "train" in accepted:
        return [{"train": split == "train"}]
    if "split" in accepted:
        return [{"split": name} for name in _SPLIT_NAMES[split]]
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
    picture = _to_picture(dataset[0][0])
    estimate = len(picture if isinstance(picture, bytes) else encode_image(picture, "PNG", 95))
    return [Item(f"{split}/{i:07d}", label, (split, i), estimate, name) for i, label in enumerate(labels)]


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
