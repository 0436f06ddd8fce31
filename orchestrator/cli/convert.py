"""``orchestrator shards convert``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from orchestrator.cli.console import given_options, note, print_json, print_table, progress
from orchestrator.errors import EXIT_DONE

MIB = 1 << 20

EPILOG = """IN is a folder of tars, with or without shards.json, or a pattern; index it first where labels are not .cls.
Pixels stay as they are, bit for bit, unless a size or a quality asks for less. Images that cannot be rewritten
stay as they were and are counted. The same command again goes on where it was killed.

examples:
  orchestrator shards convert /data/imagenet/train /fast/imagenet/train
  orchestrator shards convert '/data/web/{00000..00099}.tar' /fast/web --short-side 352 --quality 90 --workers 16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="folder or pattern of tars")
    parser.add_argument(
        "out", metavar="OUT", help="another folder; gets the tars under the same names, and shards.json"
    )
    parser.add_argument("--short-side", type=int, metavar="PX", help="shrink JPEGs whose shorter side exceeds it")
    parser.add_argument("--max-side", type=int, metavar="PX", help="shrink JPEGs whose longer side exceeds it")
    parser.add_argument("--quality", type=int, metavar="1..100", help="encode every JPEG anew with this quality")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="larger images count as damaged")
    parser.add_argument("--dry-run", action="store_true", help="say what would be converted")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from orchestrator.data.convert import ConvertOptions, convert_shards, plan_conversion

    began = time.monotonic()
    options = ConvertOptions(**given_options(args, ConvertOptions))
    if args.dry_run:
        plan = plan_conversion(args.source, Path(args.out), options)
        if args.json:
            print_json(plan)
        else:
            row = (plan["images"], plan["shards"], plan["bytes"] / MIB)
            print_table(("images", "shards", "MiB"), [row], f"{plan['name']}: {args.out} (dry run)")
        return EXIT_DONE
    body = convert_shards(args.source, Path(args.out), options, progress)
    if args.json:
        print_json(body | {"out": args.out, "seconds": round(time.monotonic() - began, 2)})
        return EXIT_DONE
    _print_table(args.out, body, time.monotonic() - began)
    return EXIT_DONE


def _print_table(out: str, body: dict[str, Any], seconds: float) -> None:
    from orchestrator.data.members import list_first

    facts = body["conversion"]
    left = facts["left"]
    rows = [
        ("images", facts["images"]),
        ("rewritten", facts["images"] - sum(left.values())),
        *((f"  of them {what}", number) for what, number in body["converted"].items()),
        *((f"left as they were: {why}", number) for why, number in left.items()),
        ("bytes after / before", facts["bytes_after"] / max(1, facts["bytes_before"])),
    ]
    print_table(("", ""), rows, f"{body['name']}: {out}, {len(body['shardlist'])} shards, {seconds:.1f} s")
    if facts["damaged"]:
        note(f"{len(facts['damaged'])} damaged images stay as they were:\n{list_first(facts['damaged'])}")
