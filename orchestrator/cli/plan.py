"""The verb that looks ahead: plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.console import note, print_json
from orchestrator.cli.outlook import exit_code_of, look_ahead, rows
from orchestrator.errors import EXIT_DONE, OrchestratorError
from orchestrator.options import Where

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.train.footprint import Footprint
    from orchestrator.train.needs import Needs

EPILOG = """examples:
  orchestrator plan train experiment=imagenet_resnet50 --gib 80 --images-per-s 20000
  orchestrator plan train experiment=quickstart --picture memory.svg
  orchestrator plan train experiment=imagenet_resnet50 cluster=kubernetes cluster.image=IMAGE@sha256:... runs_dir=/runs

The memory is that of the real step, traced without computing it: what the device's library keeps for itself (about
half a GiB on a GPU) comes on top. With cluster=kubernetes every layer of the cluster is asked whether the run fits,
waits or never starts; nothing is sent. Exit code 42: it can never start as it is."""


def add_to(subparsers: Any) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    usage = "orchestrator plan train [group=choice ...] [key=value ...] [--flag]"
    text = "what a run will need (memory, steps, hours, bytes, money), and whether a cluster has room for it"
    parser = subparsers.add_parser("plan", help=text, usage=usage, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("job", choices=("train",), help="the verb that would run")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], metavar="DIR", help="own config groups")
    parser.add_argument("--gib", type=float, metavar="N", help="memory of a device: say the largest batch that fits")
    parser.add_argument("--images-per-s", type=float, metavar="N", help="speed of the whole run: say hours and money")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the memory over the step: .svg or .png")
    parser.add_argument(
        "--snapshot",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="of a cluster, as "
        "`orchestrator snapshot -o FILE` or `kubectl get ... -o json` wrote it, instead of a live one",
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.set_defaults(run=plan, takes_overrides=True)


def plan(args: argparse.Namespace) -> int:
    from orchestrator.bundle import freeze
    from orchestrator.compose import compose
    from orchestrator.train.footprint import largest_rows, trace_step

    composed = compose(args.overrides, args.config_dir)
    config = composed.config
    needs, classes = _needs(config, args.images_per_s)
    found = None
    if args.snapshot or config.cluster.where is Where.kubernetes:
        found = look_ahead(freeze(composed), args.snapshot)
    largest = None
    if args.gib is not None:
        largest = largest_rows(int(args.gib * 2**30), lambda rows: trace_step(config, classes, rows))
    if args.picture is not None:
        from orchestrator.track.memory import draw_memory

        draw_memory(needs.footprint.timeline, args.picture)
    if args.json:
        print_json({**needs.facts(), "largest_rows": largest, "cluster": found and found.facts()})
    else:
        listed = [*told(needs, config, largest), *(rows(found) if found else ())]
        print("\n".join(f"{name:<18} {text}" for name, text in listed if text))
    return exit_code_of(found) if found else EXIT_DONE


def _needs(config: RunConfig, images_per_s: float | None) -> tuple[Needs, int]:
    from orchestrator.cluster.local import num_processes
    from orchestrator.train.footprint import trace_step
    from orchestrator.train.needs import needs_of, rows_of
    from orchestrator.train.preflight import open_sets

    processes, sets = num_processes(config.compute), None
    try:
        sets = open_sets(config)
    except OrchestratorError as error:
        note(f"the data is not known here, so neither are steps and hours: {error}")
    classes = sets.num_classes if sets else config.model.num_classes or 1000
    footprint = trace_step(config, classes, rows_of(config, processes))
    train, order = (sets.train, sets.plan(config)) if sets else (None, None)
    return needs_of(config, processes, footprint, train, order, images_per_s), classes


def told(needs: Needs, config: RunConfig, largest: int | None) -> list[tuple[str, str]]:
    """(name, text) as a person reads them; what is not known is left out."""
    from orchestrator.track.words import duration, size

    foot, nodes = needs.footprint, needs.num_nodes
    where = f" on {nodes} nodes" if nodes > 1 else ""
    checkpoints = f", {needs.checkpoints} are written" if needs.checkpoints else ""
    return [
        ("run", f"{config.model.name} on {config.data.name}, {needs.processes} processes{where}"),
        ("at once", f"{foot.rows} images of {config.data.image_size} pixels in each process"),
        ("memory", _memory(foot)),
        ("fits", f"at most {largest} images at once in that memory" if largest is not None else ""),
        ("arithmetic", f"{foot.flops_per_image / 1e9:.3g} GFLOP an image, forward and backward"),
        ("steps", f"{needs.steps:,} in {needs.epochs} epochs" if needs.steps else ""),
        ("time", f"{duration(needs.hours * 3600)} of steps" if needs.hours else ""),
        ("whole run", f"{needs.petaflops:,.3g} PFLOP" if needs.petaflops else ""),
        ("data", _data(needs)),
        ("checkpoint", f"{size(needs.checkpoint_bytes)}{checkpoints}"),
        ("cost", ", ".join(f"{cost:,.2f} {config.cluster.currency} on {name}" for name, cost in needs.cost.items())),
    ]


def _memory(foot: Footprint) -> str:
    from orchestrator.track.words import size

    parts = {
        "weights": foot.weights + foot.buffers,
        "optimizer": foot.optimizer,
        "moving average": foot.moving_average,
        "within a step": foot.within_a_step,
    }
    listed = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in parts.items() if nbytes)
    return f"{size(foot.peak)} a process at the peak ({listed})"


def _data(needs: Needs) -> str:
    from orchestrator.track.words import size

    if not needs.set_bytes or not needs.node_bytes_per_epoch:
        return ""
    share = f", a node's cache holds {needs.cached_share:.0%}" if needs.cached_share else ""
    return f"{size(needs.set_bytes)}; {size(needs.node_bytes_per_epoch)} a node and epoch where it is far{share}"
