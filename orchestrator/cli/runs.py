"""Verbs that start runs: train."""

from __future__ import annotations

import argparse
import atexit
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from orchestrator.cli.console import note, print_json
from orchestrator.config import MAY_CHANGE
from orchestrator.errors import EXIT_DONE, ConfigError, UserError
from orchestrator.options import TrackingMode, Where

if TYPE_CHECKING:
    from orchestrator.bundle import Bundle, Initial
    from orchestrator.cluster.local import Ended
    from orchestrator.config import RunConfig

EPILOG = """examples:
  orchestrator train experiment=quickstart
  orchestrator train data=cifar10 model=cifar_resnet20 recipe.epochs=20 compute.num_processes=2 tracking=online
  orchestrator train experiment=imagenet_resnet50 --canary
  orchestrator train compute.num_nodes=2 compute.num_processes=16 cluster=kubernetes --follow

The same command again resumes the run, or says that it is finished. Other values are another run, except of these
keys, which may change from one attempt to the next:
{may_change}"""


def add_to(subparsers: Any) -> None:
    keys = fill(", ".join(MAY_CHANGE), 116, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    parser = subparsers.add_parser(
        "train",
        help="train a model, or go on where the same run stopped",
        usage="orchestrator train [group=choice ...] [key=value ...] [--flag]",
        epilog=EPILOG.format(may_change=keys),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_flags(parser)
    parser.add_argument("--cfg", action="store_true", help="print the config, each value with its source, and stop")
    parser.add_argument("--dry-run", action="store_true", help="print exactly what would run or be sent, and stop")
    parser.add_argument("--canary", action="store_true", help="try three steps, a resume and all that is written")
    parser.add_argument("--no-canary", action="store_true", help="on several nodes: the first does not try it alone")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="write the objects of Kubernetes, send nothing")
    parser.add_argument("--follow", action="store_true", help="on a cluster: print the logs, end with the run's code")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=train, takes_overrides=True)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-dir", type=Path, action="append", default=[], metavar="DIR", help="folder with your own config groups"
    )


def train(args: argparse.Namespace) -> int:
    began = time.time()
    if args.no_canary:
        args.overrides = [*args.overrides, "cluster.canary=false"]
    elsewhere = any(text.startswith("cluster=") and text != "cluster=local" for text in args.overrides)
    if not (args.cfg or args.dry_run or elsewhere):
        from orchestrator.cluster import local

        local.warm_up()
    from orchestrator.compose import compose, render

    composed = compose(args.overrides, args.config_dir)
    if args.cfg:
        print(render(composed))
        return EXIT_DONE
    from orchestrator.bundle import freeze

    bundle = freeze(composed, _initial(composed.config))
    if composed.config.cluster.where is not Where.local:
        from orchestrator.cli.submit import send

        return send(bundle, args)
    return _train_here(bundle, args, began)


def _train_here(bundle: Bundle, args: argparse.Namespace, began: float) -> int:
    from orchestrator.cluster import local

    if args.manifest:
        rule = "writes objects of Kubernetes, and this run stays here"
        raise ConfigError("--manifest", args.manifest, rule, "cluster=kubernetes")
    _require_fits_here(bundle.config)
    if args.dry_run:
        return _dry_run(bundle, args.json)
    if args.canary:
        from orchestrator.cli.canary import run_canary

        return run_canary(bundle, args.json)
    local.warm_up()
    return _launch(bundle, args.json, began)


def _require_fits_here(config: RunConfig) -> None:
    from orchestrator.bundle import folder_of_runs
    from orchestrator.secrets import require_secret

    folder_of_runs(config)
    if config.compute.num_nodes > 1:
        way_out = "compute.num_nodes=1, or cluster=kubernetes or ray"
        raise ConfigError("compute.num_nodes", config.compute.num_nodes, "needs more machines than this one", way_out)
    # the first rank reads it later, and without it the run would go on offline
    if config.tracking.mode is TrackingMode.online and config.tracking.secret is not None:
        require_secret("tracking", config.tracking.secret)


def go_on(folder: Path, as_json: bool) -> int:
    """Run what the run.json of a folder says, with the code and packages of now; the exit code is the run's."""
    began = time.time()
    from orchestrator.cluster import local

    local.warm_up()
    from orchestrator.bundle import load_bundle, renew, with_config

    bundle = load_bundle(folder / "run.json")
    where = bundle.config.cluster.where
    if where is not Where.local:
        what = f"run {bundle.run_id} is one of cluster={where.name}, and this folder a copy"
        raise UserError(f"{what}. Way out: orchestrator resume {bundle.run_id} cluster={where.name}")
    if bundle.folder.resolve() != folder.resolve():
        bundle = with_config(bundle, replace(bundle.config, runs_dir=str(folder.parent)))
    return _launch(renew(bundle), as_json, began)


def _initial(config: RunConfig) -> Initial | None:
    if config.init_from is None:
        return None
    from orchestrator.train.initial import find_initial

    return find_initial(config)


def _dry_run(bundle: Bundle, as_json: bool) -> int:
    from orchestrator.cluster.local import num_processes
    from orchestrator.train.preflight import check_run, total_steps

    config, processes = bundle.config, num_processes(bundle.config.compute)
    sets = check_run(config, processes)
    plan = sets.plan(config)
    facts = {
        "run_id": bundle.run_id,
        "folder": str(bundle.folder),
        "cluster": config.cluster.where.name,
        "command": f"torchrun --nproc-per-node {processes} -m jobs.train {bundle.folder}/run.json",
        "processes": processes,
        "model": config.model.name,
        "classes": sets.num_classes,
        "train_samples": sets.train.num_samples,
        "val_samples": sets.val.num_samples,
        "global_batch_size": config.recipe.global_batch_size,
        "steps_per_epoch": plan.steps_per_epoch,
        "total_steps": total_steps(config, plan.steps_per_epoch),
        "tracking": config.tracking.mode.name,
        "state": _state(bundle),
    }
    if as_json:
        print_json(facts)
    else:
        print("\n".join(f"{name:<18} {value}" for name, value in facts.items()))
    return EXIT_DONE


def _state(bundle: Bundle) -> str:
    from orchestrator.files import read_json

    path = bundle.folder / "result.json"
    if not path.exists():
        return "new"
    result = read_json(path)
    return "already finished" if result["state"] == "done" else f"would resume after step {result['step']}"


def _launch(bundle: Bundle, as_json: bool, began: float) -> int:
    from orchestrator.bundle import write_bundle
    from orchestrator.cluster.local import free_port, num_processes
    from orchestrator.cluster.lock import only_writer
    from orchestrator.cluster.record import conclude, is_finished, warning_of_other_code
    from orchestrator.train.earlier import tell_earlier
    from orchestrator.train.preflight import check_run

    sets = check_run(bundle.config, num_processes(bundle.config.compute))
    free_port(bundle.config.compute)
    with only_writer(bundle.folder):
        if is_finished(bundle.folder):
            note(f"run {bundle.run_id} is already finished; another seed or name starts a new one")
            _show(bundle, as_json, None)
            return EXIT_DONE
        if other := warning_of_other_code(bundle):
            note(other)
        if earlier := tell_earlier(bundle):
            note(earlier)
        write_bundle(bundle, bundle.folder / "run.json", sets.facts())
        ended = _run(bundle, began)
    with _deaf_to_stops():
        if missing := conclude(bundle, ended):
            note(missing)
        _show(bundle, as_json, time.time() - began)
        if ended.error:
            tell_cause(bundle, ended)
    return ended.exit_code


@contextmanager
def _deaf_to_stops() -> Iterator[None]:
    """The run has ended: another request to stop must not replace its exit code, nor while the interpreter ends."""
    earlier = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
            atexit.register(signal.signal, number, signal.SIG_IGN)


def _run(bundle: Bundle, began: float) -> Ended:
    from jobs.train import rank
    from orchestrator.cluster.local import num_processes, run_attempts

    config = bundle.config
    what = f"{config.model.name} on {config.data.name}, {num_processes(config.compute)} processes"
    note(f"run {bundle.run_id}: {what}, tracking {config.tracking.mode.name}")
    return run_attempts(bundle, rank, (str(bundle.folder / "run.json"),), began)


def _show(bundle: Bundle, as_json: bool, seconds: float | None) -> None:
    from orchestrator.files import read_json

    result = read_json(bundle.folder / "result.json")
    if as_json:
        print_json(result)
        return
    accuracy = result["metrics"].get("val/acc1")
    if accuracy:
        print(f"top-1       {accuracy['value']:.2%} ({accuracy['hits']}/{accuracy['count']})")
    print(f"state       {result['state']}, step {result['step']}" + (f", {seconds:.0f} s" if seconds else ""))
    if result["state"] == "stopped":
        print("next        the same command goes on from here")
    for name, path in places(bundle, result).items():
        print(f"{name:<11} {path}")


def places(bundle: Bundle, result: dict[str, Any]) -> dict[str, str]:
    """Where a person finds what the run left."""
    found = {"checkpoint": result.get("best") or result.get("last"), "report": str(bundle.folder / "report.html")}
    mirrors = sorted((bundle.folder / "wandb").glob("*run-*"))
    if mirrors:
        hint = "  (wandb sync uploads it)" if "offline" in mirrors[-1].name else ""
        found["W&B run"] = f"{mirrors[-1]}{hint}"
    return {name: path for name, path in found.items() if path}


def tell_cause(bundle: Bundle, ended: Ended) -> None:
    """The first true cause, last."""
    if ended.traceback:
        note(f"all output: {bundle.folder}/logs")
        note(ended.traceback.rstrip())
    where = f"rank {ended.rank}: " if ended.rank is not None else ""
    note(f"error: {where}{ended.error}")
