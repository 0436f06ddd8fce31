"""``orchestrator shards make | convert | index | verify | inspect | bench``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from orchestrator.cli import convert, shards_bench
from orchestrator.cli.console import given_options, note, print_json, print_table, progress
from orchestrator.errors import EXIT_DONE, EXIT_USER, DataError

SHOWN = 20
MIB = 1 << 20

MAKE_EPILOG = """SOURCE is one of
  FOLDER                     CLASS/*, or train/CLASS/* and val/CLASS/*
  x.tar  x.tar.gz  x.zip     an archive of such a folder
  x.csv                      a manifest with the header path,label[,split]
  x.parquet  FOLDER  'GLOB'  parquet files as on the Hugging Face hub, splits by the names of files and folders
  FOLDER                     what Hugging Face's save_to_disk wrote
  'torchvision:NAME [key=value ...]'   a class of torchvision.datasets with its own arguments;
                             split=trainval,test names the training and the validation split
  digits | synthetic | an entry point of orchestrator.datasets

The same source and options give the same bytes; the same command again goes on where it was killed.

examples:
  orchestrator shards make digits data/digits
  orchestrator shards make imagenet-1k/data data/imagenet          # parquet files of the Hugging Face hub
  orchestrator shards make 'food101/data/train-*.parquet' data/food101 --image-column image --label-column label
  orchestrator shards make torchvision:CIFAR10 data/cifar10 --root ~/data --download
  orchestrator shards make 'torchvision:FGVCAircraft split=trainval,test' data/aircraft --root ~/data
  orchestrator shards make photos.tar.gz data/photos --max-side 512 --quality 90 --on-bad skip --workers 8"""
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
    add_make_arguments(_leaf(leaves, "make", "pack labelled images into shards", MAKE_EPILOG))
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


def add_make_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `shards make`, which `jobs/make_shards.py` takes as well."""
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", metavar="OUT", help="gets train/ and val/, each with tars and shards.json")
    add = parser.add_argument_group("shards").add_argument
    add("--shard-size-mib", type=int, default=256, metavar="MIB", help="of source images (default 256)")
    add("--samples-per-shard", type=int, metavar="N", help="instead of a size")
    add("--workers", type=int, metavar="N", help="packing processes (default: one per core)")
    add("--seed", type=int, default=0, help="of the shuffle and of the validation split")
    add("--val-fraction", type=float, metavar="F", help="share of each class, without a val folder (default 0.1)")
    add = parser.add_argument_group("images").add_argument
    add("--format", choices=("keep", "jpeg", "png"), default="keep", help="keep: bytes stay unless they must change")
    add("--max-side", type=int, metavar="PX", help="shrink images whose longer side exceeds it")
    add("--short-side", type=int, metavar="PX", help="shrink images whose shorter side exceeds it")
    add("--quality", type=int, metavar="1..100", help="encode every JPEG anew with this quality")
    add(
        "--no-crop-ready",
        dest="crop_ready",
        action="store_false",
        help="leave JPEGs as they come; crop-ready ones have the same pixels and decode faster",
    )
    add(
        "--on-bad", choices=("fail", "skip"), default="fail", help="unreadable images: list all and fail, or count them"
    )
    add("--max-pixels", type=int, metavar="N", help="larger images count as unreadable")
    add = parser.add_argument_group("data sets").add_argument
    add("--samples", type=int, default=1000, help="synthetic")
    add("--classes", type=int, default=10, help="synthetic")
    add("--size", type=int, default=32, metavar="PX", help="synthetic")
    add("--image-column", metavar="NAME", help="parquet and saved data sets (default: image, img, jpg, ...)")
    add("--label-column", metavar="NAME", help="the same (default: label, cls, fine_label, ...)")
    add("--root", default="data", help="torchvision: where the data set lies")
    add("--download", action="store_true", help="torchvision: fetch it first")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=make)


def make(args: argparse.Namespace) -> int:
    from orchestrator.data.plan import MakeOptions
    from orchestrator.data.sources import SourceOptions
    from orchestrator.data.writer import make_shards, plan_shards

    began = time.monotonic()
    source = SourceOptions(**given_options(args, SourceOptions))
    options = MakeOptions(**given_options(args, MakeOptions))
    if args.dry_run:
        plan = plan_shards(args.source, source, options)
        _print_plan(args, plan)
        return EXIT_DONE
    made = make_shards(args.source, Path(args.out), source, options, progress)
    if args.json:
        print_json(made | {"out": args.out, "seconds": round(time.monotonic() - began, 2)})
        return EXIT_DONE
    _print_made(args.out, made, time.monotonic() - began)
    return EXIT_DONE


def _print_plan(args: argparse.Namespace, plan: dict[str, Any]) -> None:
    if args.json:
        print_json(plan)
        return
    rows = [(split, facts["samples"], facts["shards"]) for split, facts in plan["splits"].items()]
    print_table(("split", "samples", "shards"), rows, f"{plan['name']}: {plan['classes']} classes (dry run)")


def _print_made(out: str, made: dict[str, Any], seconds: float) -> None:
    rows = []
    for split, body in made["splits"].items():
        shards = body["shardlist"]
        size = sum(shard["filesize"] for shard in shards) / MIB
        converted = ", ".join(f"{n} {what}" for what, n in body["converted"].items()) or "none"
        samples = sum(shard["nsamples"] for shard in shards)
        rows.append((split, samples, len(body["classes"]), len(shards), size, body["skipped"], converted))
    columns = ("split", "samples", "classes", "shards", "MiB", "skipped", "converted")
    print_table(columns, rows, f"{made['name']}: {out}, {seconds:.1f} s")
    if made["ignored_files"]:
        note(f"{made['ignored_files']} files are no images of a class of train or val and were ignored")
    if "val" not in made["splits"]:
        note("no validation set: no class has two images. Way out: put some under val/CLASS/")


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
