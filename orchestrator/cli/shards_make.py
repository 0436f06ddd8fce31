"""``orchestrator shards make``: labelled images become shards, here or in a pod of a cluster."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.cli.console import given_options, note, print_json, print_table, progress
from orchestrator.cli.runs import add_config_flags
from orchestrator.errors import EXIT_DONE, ConfigError

MIB = 1 << 20
HERE = ("source", "out", "dry_run", "json", "run")
"""Of the command, what is no option of the work itself."""
EPILOG = """SOURCE is one of
  FOLDER                     CLASS/*, or train/CLASS/* and val/CLASS/*
  x.tar  x.tar.gz  x.zip     an archive of such a folder
  x.csv                      a manifest with the header path,label[,split]
  x.parquet  FOLDER  'GLOB'  parquet files as on the Hugging Face hub, splits by the names of files and folders
  FOLDER                     what Hugging Face's save_to_disk wrote
  'torchvision:NAME [key=value ...]'   a class of torchvision.datasets with its own arguments;
                             split=trainval,test names the training and the validation split
  digits | synthetic | an entry point of orchestrator.datasets

The same source and options give the same bytes; the same command again goes on where it was killed.
With cluster=kubernetes a pod does it, on the claims of cluster.volumes; its id is then a run's to ls, status, logs -f,
cancel, resume and rm.

examples:
  orchestrator shards make digits data/digits
  orchestrator shards make imagenet-1k/data data/imagenet          # parquet files of the Hugging Face hub
  orchestrator shards make 'food101/data/train-*.parquet' data/food101 --image-column image --label-column label
  orchestrator shards make torchvision:CIFAR10 data/cifar10 --root ~/data --download
  orchestrator shards make 'torchvision:FGVCAircraft split=trainval,test' data/aircraft --root ~/data
  orchestrator shards make photos.tar.gz data/photos --max-side 512 --quality 90 --on-bad skip --workers 8
  orchestrator shards make /photos /data/photos --workers 8 --follow --config-dir my_conf cluster=training"""


def add_leaf(parser: argparse.ArgumentParser) -> None:
    """The verb: what the program takes, and where it runs."""
    add_make_arguments(parser)
    add = parser.add_argument_group("on a cluster (cluster=kubernetes and its keys)").add_argument
    add("--manifest", type=Path, metavar="FILE", help="write the objects of Kubernetes, send nothing")
    add("--follow", action="store_true", help="print the log, end with the exit code of the pod")
    add_config_flags(parser)
    parser.set_defaults(run=make_somewhere, takes_overrides=True)


def make_somewhere(args: argparse.Namespace) -> int:
    from orchestrator.cli.backends import compose_cluster
    from orchestrator.options import Where

    cluster = compose_cluster(args)
    if cluster is not None and cluster.where is not Where.local:
        from orchestrator.cli.shards_send import send

        return send(cluster, args)
    if args.manifest:
        rule = "writes objects of Kubernetes, and these shards are made here"
        raise ConfigError("--manifest", args.manifest, rule, "cluster=kubernetes")
    return make(args)


def add_make_arguments(parser: argparse.ArgumentParser) -> None:
    """What `jobs/make_shards.py` takes as well."""
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


def words_of(args: argparse.Namespace, without: Sequence[str] = ()) -> list[str]:
    """The command again, for a program elsewhere: what was left at its default is left out, and `without`."""
    parser = argparse.ArgumentParser()
    add_make_arguments(parser)
    words = [args.source, args.out]
    for name, default in vars(parser.parse_args(["source", "out"])).items():
        value, flag = getattr(args, name), name.replace("_", "-")
        if name in (*HERE, *without) or value == default:
            continue
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


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
