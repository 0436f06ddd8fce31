"""``orchestrator shards make | convert | index | verify | inspect | bench``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from orchestrator.cli import convert, shards_bench, shards_make
from orchestrator.cli.console import note, print_json, print_table, progress
from orchestrator.errors import EXIT_DONE, EXIT_USER, DataError

SHOWN = 20
MIB = 1 << 20

INDEX_EPILOG = """examples:
  orchestrator shards index /data/imagenet/train --classes imagenet_classes.txt
  orchestrator shards index '/data/web/{00000..00099}.tar' --label label
  orchestrator shards index /data/img2dataset --label json:label     # a field of each sample's JSON member"""
VERIFY_EPILOG = """examples:
  orchestrator shards verify data/digits
  orchestrator shards verify '/data/imagenet/train-{000000..000009}.tar' --json"""
INSPECT_EPILOG = """examples:
  orchestrator shards inspect data/digits
  orchestrator shards inspect data/photos/train --png photos.png"""


def add_to(subparsers: Any) -> None:
    """Register `shards` and its leaves."""
    family = subparsers.add_parser("shards", help="pack, index, check and look at WebDataset shards")
    names = "make | convert | index | verify | inspect | bench"
    leaves = family.add_subparsers(dest="leaf", required=True, metavar=names)
    shards_make.add_leaf(_leaf(leaves, "make", "pack labelled images into shards", shards_make.EPILOG))
    convert.add_arguments(_leaf(leaves, "convert", "write existing tars again, crop-ready", convert.EPILOG))
    index = _leaf(leaves, "index", "index tars that exist", INDEX_EPILOG)
    index.add_argument("location", metavar="FOLDER|PATTERN")
    index.add_argument(
        "--label",
        default="cls",
        metavar="EXT|json:FIELD",
        help="members, or field of JSON members, with the class number",
    )
    index.add_argument("--classes", metavar="FILE", help="class names: one to a line, or a JSON list")
    index.add_argument("--json", action="store_true")
    index.set_defaults(run=index_tars)
    verify = _leaf(leaves, "verify", "read every byte again and decode every image", VERIFY_EPILOG)
    verify.add_argument("location", metavar="LOCATION")
    verify.add_argument("--max-pixels", type=int, metavar="N")
    verify.add_argument("--json", action="store_true")
    verify.set_defaults(run=verify_shards)
    inspect = _leaf(leaves, "inspect", "class counts, sizes, shards, and a contact sheet", INSPECT_EPILOG)
    inspect.add_argument("location", metavar="LOCATION")
    inspect.add_argument("--png", metavar="OUT.png", help="write a contact sheet of samples")
    inspect.add_argument("--max-pixels", type=int, metavar="N")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=inspect_shards)
    shards_bench.add_arguments(_leaf(leaves, "bench", "how fast they load on this machine", shards_bench.EPILOG))


def _leaf(leaves: Any, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    return leaves.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def index_tars(args: argparse.Namespace) -> int:
    from orchestrator.data import indexing

    with progress("indexing", len(indexing.find_tars(args.location)), "tars") as advance:
        folder, body = indexing.index_tars(args.location, args.label, args.classes, advance)
    if args.json:
        print_json(body)
        return EXIT_DONE
    samples = sum(shard["nsamples"] for shard in body["shardlist"])
    note(f"{folder}/shards.json: {samples:,} samples, {len(body['classes'])} classes, {len(body['shardlist'])} shards")
    if ignored := body.get("ignored_members"):
        note("left unread: " + ", ".join(f"{number:,} {extension}" for extension, number in ignored.items()))
    return EXIT_DONE


def verify_shards(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from orchestrator.data.images import MAX_PIXELS
    from orchestrator.data.index import load_index
    from orchestrator.data.members import list_first
    from orchestrator.data.verify import verify_set

    indices = [load_index(place) for place in _sets(args.location)]
    samples = sum(index.num_samples for index in indices)
    with progress("verifying", samples, "images") as advance:
        faults = [fault for index in indices for fault in verify_set(index, args.max_pixels or MAX_PIXELS, advance)]
    if args.json:
        print_json(
            {"sets": [index.location for index in indices], "samples": samples, "faults": [asdict(f) for f in faults]}
        )
        return EXIT_USER if faults else EXIT_DONE
    if faults:
        raise DataError(
            f"{args.location}: {len(faults)} faults:\n{list_first(map(str, faults))}\n"
            "Way out: copy or make these shards again; `--json` lists all faults"
        )
    note(f"{args.location}: {samples:,} images in {sum(len(i.shards) for i in indices):,} shards are as the index says")
    return EXIT_DONE


def _sets(location: str) -> list[str]:
    """A folder that holds train/ and val/ stands for both."""
    folder = Path(location)
    if folder.is_dir() and not (folder / "shards.json").exists():
        found = [str(folder / split) for split in ("train", "val") if (folder / split / "shards.json").exists()]
        return found or [location]
    return [location]


def inspect_shards(args: argparse.Namespace) -> int:
    from orchestrator.data.index import load_index, read_body

    places = _sets(args.location)
    indices = [load_index(place) for place in places]
    facts = [_describe(index, read_body(place)) for index, place in zip(indices, places, strict=True)]
    sheets = _draw_sheets(args, indices) if args.png else []
    if args.json:
        print_json({"sets": facts, "sheets": sheets})
        return EXIT_DONE
    for one in facts:
        _print_facts(one)
    for sheet in sheets:
        note(f"contact sheet: {sheet}")
    return EXIT_DONE


def _describe(index: Any, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": index.name,
        "location": index.location,
        "digest": index.digest,
        "samples": index.num_samples,
        "bytes": sum(shard.filesize for shard in index.shards),
        "class_counts": dict(zip(index.classes, index.class_counts, strict=True)),
        "size_histogram": body.get("size_histogram", {}),
        "converted": body.get("converted", {}),
        "skipped": body.get("skipped", 0),
        "ignored_members": body.get("ignored_members", {}),
        "shards": [
            {"location": s.location, "samples": s.nsamples, "bytes": s.filesize, "sha256": s.sha256}
            for s in index.shards
        ],
    }


def _draw_sheets(args: argparse.Namespace, indices: list[Any]) -> list[str]:
    from orchestrator.data.contact import draw_sheet
    from orchestrator.data.images import MAX_PIXELS

    out = Path(args.png)
    paths = [out]
    if len(indices) > 1:
        paths = [out.with_name(f"{out.stem}-{Path(index.location).parent.name}{out.suffix}") for index in indices]
    for index, path in zip(indices, paths, strict=True):
        draw_sheet(index, args.max_pixels or MAX_PIXELS, path)
    return [str(path) for path in paths]


def _print_facts(facts: dict[str, Any]) -> None:
    counts = facts["class_counts"]
    title = f"{facts['name']}: {facts['samples']:,} samples, {len(counts):,} classes, {facts['bytes'] / MIB:.1f} MiB"
    _print_first(("class", "samples", ""), _bars(counts), title)
    _print_first(("size", "images", ""), _bars(facts["size_histogram"]))
    print_table(("converted", "images"), [*facts["converted"].items(), ("left out", facts["skipped"])])
    rows = [(Path(s["location"]).name, s["samples"], s["bytes"] / MIB, s["sha256"][:12]) for s in facts["shards"]]
    _print_first(("shard", "samples", "MiB", "sha256"), rows)


def _bars(counts: dict[str, int]) -> list[tuple[Any, ...]]:
    most = max(counts.values(), default=1) or 1
    return [(name, count, "█" * round(24 * count / most)) for name, count in counts.items()]


def _print_first(columns: tuple[str, ...], rows: list[tuple[Any, ...]], title: str | None = None) -> None:
    print_table(columns, rows[:SHOWN], title)
    if len(rows) > SHOWN:
        print(f"... and {len(rows) - SHOWN:,} more; --json lists all")
