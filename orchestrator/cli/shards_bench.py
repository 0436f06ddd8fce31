"""``orchestrator shards bench``: how fast these shards load on this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.console import note, print_json, print_table, progress
from orchestrator.errors import EXIT_DONE

if TYPE_CHECKING:
    from orchestrator.data.bench import Report

EPILOG = """key=value overrides say how images are loaded, as for `train`; by default as data=imagefolder does.

examples:
  orchestrator shards bench data/photos/train --consume 2500
  orchestrator shards bench '/data/imagenet/train-{000000..000009}.tar' --workers 0,2,4,8 --png speed.png \\
      data=imagenet data.image_size=176 recipe.global_batch_size=256"""
BAR = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("location", metavar="PATTERN|DIR")
    parser.add_argument("--workers", metavar="N,...", help="loader processes to try (default: 0, 1, 2, ... cores)")
    parser.add_argument("--consume", type=float, metavar="IMAGES_PER_S", help="how fast the model takes images")
    parser.add_argument("--png", metavar="OUT.png", help="draw the speeds")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=bench, takes_overrides=True)


def bench(args: argparse.Namespace) -> int:
    from orchestrator.compose import compose
    from orchestrator.data import bench as measuring
    from orchestrator.data.index import load_index
    from orchestrator.files import write_atomic

    measuring.require_consume(args.consume)
    cores = len(os.sched_getaffinity(0))
    workers = measuring.parse_workers(args.workers) if args.workers else measuring.default_workers(cores)
    named = any(override.startswith("data=") for override in args.overrides)
    config = compose([*([] if named else ["data=imagefolder"]), *args.overrides]).config
    index = load_index(args.location)
    with progress("measuring", 2 + len(workers), "parts") as advance:
        report = measuring.bench_shards(index, config, workers, args.consume, advance)
    if args.png:
        write_atomic(Path(args.png), measuring.draw(report))
        note(f"chart: {args.png}")
    if args.json:
        print_json(report.to_dict())
    else:
        _print(report)
    return EXIT_DONE


def _print(report: Report) -> None:
    reading, cold = report.reading, report.reading.cold_mb_per_s
    best = max(speed.images_per_s for speed in report.speeds)
    rows = [
        (
            speed.workers,
            round(speed.images_per_s),
            "-" if speed.wait_fraction is None else f"{speed.wait_fraction:.0%}",
            "█" * round(BAR * speed.images_per_s / best),
        )
        for speed in report.speeds
    ]
    title = f"{report.location}: {report.samples:,} samples, batches of {report.global_batch_size}"
    print_table(("workers", "images/s", "waits", ""), rows, title)
    told = "the kernel kept them" if cold is None else f"{cold:,.0f} MB/s"
    print(f"read {reading.bytes / 10**6:,.0f} MB: from disk {told}, from memory {reading.warm_mb_per_s:,.0f} MB/s")
    print(f"decode: {report.images_per_cpu_s:,.0f} images/s per core")
    print(f"data.num_workers={report.worth}: fewest within 5 % of the best")
