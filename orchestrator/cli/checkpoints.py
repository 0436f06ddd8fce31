"""Verbs on checkpoints: evaluate, predict."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.console import note, print_json, print_table, progress
from orchestrator.cli.runs import add_config_flags, tell_cause
from orchestrator.errors import EXIT_DONE, ConfigError, DataError

if TYPE_CHECKING:
    from orchestrator.bundle import Bundle
    from orchestrator.train.loading import Source

EVALUATE = """examples:
  orchestrator evaluate checkpoint=quickstart-1a2b3c4d:best
  orchestrator evaluate checkpoint=resnet20.th model=cifar_resnet20 data=cifar10 compute.num_processes=2

Model and preprocessing come from the checkpoint; for a bare weights file give both."""
PREDICT = """examples:
  orchestrator predict checkpoint=quickstart-1a2b3c4d:best image.png
  orchestrator predict checkpoint=runs/quickstart-1a2b3c4d/checkpoints/step_00000230 photos/ --top 3 --json"""


def add_to(subparsers: Any) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    usage = "orchestrator evaluate checkpoint=PATH|ID[:best|:last] [key=value ...] [--flag]"
    evaluating = subparsers.add_parser(
        "evaluate", help="count every image of data.val exactly once", usage=usage, epilog=EVALUATE, formatter_class=raw
    )
    evaluating.set_defaults(run=evaluate)
    usage = "orchestrator predict checkpoint=PATH|ID[:best|:last] IMAGE|DIR ... [key=value ...] [--flag]"
    predicting = subparsers.add_parser(
        "predict", help="name what images show", usage=usage, epilog=PREDICT, formatter_class=raw
    )
    predicting.add_argument("images", nargs="+", metavar="IMAGE|DIR")
    predicting.add_argument("--top", type=int, default=5, help="classes per image (default 5)")
    predicting.set_defaults(run=predict)
    for parser in (evaluating, predicting):
        add_config_flags(parser)
        parser.add_argument("--json", action="store_true", help="print facts as JSON")
        parser.set_defaults(takes_overrides=True)


def _source(args: argparse.Namespace) -> Source:
    from orchestrator.compose import compose
    from orchestrator.train.loading import find_checkpoint, open_source

    named = [text.split("=", 1)[1] for text in args.overrides if text.startswith("checkpoint=")]
    if len(named) != 1:
        raise ConfigError("checkpoint", "(missing)", "must be given once", "checkpoint=PATH, ID:best or ID:last")
    composed = compose([text for text in args.overrides if not text.startswith("checkpoint=")], args.config_dir)
    return open_source(find_checkpoint(named[0], Path(composed.config.runs_dir)), composed)


def evaluate(args: argparse.Namespace) -> int:
    from orchestrator.cluster import local

    local.warm_up()
    from jobs.evaluate import rank
    from orchestrator.bundle import write_bundle
    from orchestrator.cluster.lock import only_writer
    from orchestrator.data.index import load_index
    from orchestrator.files import read_json
    from orchestrator.secrets import use_for_stores
    from orchestrator.train.evaluation_job import write_source
    from orchestrator.train.preflight import set_facts
    from orchestrator.train.process import require_device

    source = _source(args)
    use_for_stores(source.config.cluster.store_secret)
    bundle, compute = _evaluation_bundle(source), source.config.compute
    index, processes = load_index(source.config.data.val), local.num_processes(compute)
    require_device(compute, processes)
    local.free_port(compute)
    with only_writer(bundle.folder):
        write_bundle(bundle, bundle.folder / "run.json", {"val": set_facts(index)})
        write_source(source, bundle.folder)
        what = source.folder or source.config.model.weights
        note(f"evaluating {what} on {index.num_samples} images, {processes} processes")
        ended = local.run_attempts(bundle, rank, (str(bundle.folder / "run.json"),))
    if ended.exit_code:
        tell_cause(bundle, ended)
        return ended.exit_code
    _show_evaluation(read_json(bundle.folder / "result.json"), bundle, args.json)
    return EXIT_DONE


def _evaluation_bundle(source: Source) -> Bundle:
    from dataclasses import replace
    from hashlib import sha256

    from orchestrator.bundle import freeze
    from orchestrator.compose import Composed

    bundle = freeze(Composed(source.config, (), {}))
    key = f"{source.identity} {bundle.config_hash} {time.time_ns()}"
    return replace(bundle, run_id=f"evaluate-{sha256(key.encode()).hexdigest()[:8]}")


def _show_evaluation(result: dict[str, Any], bundle: Bundle, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    for name in ("val/acc1", "val/acc5"):
        value = result["metrics"][name]
        print(f"{name:<10} {value['value']:.2%} ({value['hits']}/{value['count']})")
    print(f"{'val/loss':<10} {result['metrics']['val/loss']:.4f}")
    print(f"{'details':<10} {bundle.folder}/evaluation.json")


def predict(args: argparse.Namespace) -> int:
    from orchestrator.data.members import list_first
    from orchestrator.train.loading import load
    from orchestrator.train.predict import find_images
    from orchestrator.train.predict import predict as predict_images

    if args.top < 1:
        raise ConfigError("--top", args.top, "must be at least 1", "--top 5")
    images = find_images(args.images)
    source = _source(args)
    loaded = load(source, None)
    with progress("predicting", len(images), "images") as advance:
        results = list(predict_images(loaded, images, args.top, source.config.data.max_pixels, advance))
    if args.json:
        print_json([result.as_json() for result in results])
    else:
        rows = [
            [str(r.path) if not place else "", place + 1, guess.name, f"{guess.probability:.2%}"]
            for r in results
            for place, guess in enumerate(r.guesses)
        ]
        print_table(["image", "#", "class", "probability"], rows)
    bad = [f"{result.path}: {result.error}" for result in results if result.error]
    if bad:
        way_out = "Way out: mend or leave out these files; the others are predicted above"
        raise DataError(f"{len(bad)} of {len(results)} images cannot be read:\n{list_first(bad)}\n{way_out}")
    return EXIT_DONE
