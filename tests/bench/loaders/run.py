"""``python -m tests.bench.loaders.run NAME --data DIR --workers N --batches K``: one loader, measured as JSON.

`images`, `wall_s` and `cpu_s` are those of the K batches that follow the warm-up; `first_batch_s` counts from the start
of the process to the first batch as a tensor of torch, whatever the loader makes, all imports included;
`memory_mib_per_worker` is what the tree holds of its own at the end, over N.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.loaders import BATCH, SIDE
from tests.bench.loaders.catalogue import LIMIT, LOADERS
from tests.bench.loaders.process import cpu_s, own_mib, started_s_ago


def measure(batches: Iterator[Any], workers: int, count: int, warm_up: int) -> dict[str, float]:
    """Take `warm_up` and then `count` batches; every one must be whole."""
    batches = map(_as_tensor, batches)
    _require_whole(next(batches))
    first = started_s_ago(os.getpid())
    for _ in range(warm_up - 1):
        next(batches)
    began, used = time.perf_counter(), cpu_s(os.getpid())
    images = sum(_require_whole(next(batches)) for _ in range(count))
    wall, cpu = time.perf_counter() - began, cpu_s(os.getpid()) - used
    memory = own_mib(os.getpid()) / workers
    return {
        "images": images,
        "wall_s": wall,
        "cpu_s": cpu,
        "first_batch_s": first,
        "memory_mib_per_worker": memory,
    }


def _as_tensor(batch: Any) -> Any:
    """The batch as a PyTorch trainer takes it; arrays are not copied."""
    import torch

    return batch if isinstance(batch, torch.Tensor) else torch.from_numpy(batch)


def _require_whole(batch: Any) -> int:
    """Its images; our steps may be one image short of a full batch where the set is no multiple of it."""
    count, *shape = batch.shape
    assert count in (BATCH, BATCH - 1), count
    assert tuple(shape) in ((SIDE, SIDE, 3), (3, SIDE, SIDE)), shape
    assert "uint8" in str(batch.dtype), batch.dtype
    return count


def sheet(batches: Iterator[Any], path: Path) -> None:
    """Draw the first 24 images of the first batch."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(next(batches))[:24]
    pixels = pixels if pixels.shape[-1] == 3 else pixels.transpose(0, 2, 3, 1)
    rows = pixels.reshape(4, 6, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
    Image.fromarray(np.ascontiguousarray(rows).reshape(4 * SIDE, 6 * SIDE, 3)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=LOADERS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=6)
    parser.add_argument("--sheet", type=Path, help="draw some images instead of measuring")
    parser.add_argument("--convert", action="store_true", help="make the loader's own format instead of measuring")
    parser.add_argument("--folder", help="of the set: what is read or made, where it is not the catalogue's")
    args = parser.parse_args()
    loader = LOADERS[args.name]
    data = args.data / (args.folder or loader.data)
    module = importlib.import_module(f"tests.bench.loaders.{loader.module}")
    if args.convert:
        module.convert(args.data, data)
    elif args.name == LIMIT:
        print(json.dumps(module.measure(args.data, args.workers, args.batches, args.warm_up, args.sheet)))
    elif args.sheet:
        sheet(iter(module.batches(data, args.workers, **loader.options)), args.sheet)
    else:
        batches = iter(module.batches(data, args.workers, **loader.options))
        print(json.dumps(measure(batches, args.workers, args.batches, args.warm_up)))
    sys.stdout.flush()
    os._exit(0)  # some loaders take seconds to end their threads, which nobody measures


if __name__ == "__main__":
    main()
