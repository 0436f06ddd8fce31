"""Verbs that follow, stop and go on with runs wherever they are: logs, cancel, resume, pull, stack, rm."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.backends import add_id, add_verb, folder_here, open_run, same_cluster
from orchestrator.cli.console import note, print_json
from orchestrator.errors import EXIT_DONE, EXIT_INTERRUPTED, UserError

if TYPE_CHECKING:
    from orchestrator.cluster.backend import Backend, LogLine

COLORS = (36, 33, 35, 32, 34, 96, 93, 95, 92, 94)
"""Of the prefix, one after the other by rank."""
LOGS = """examples:
  orchestrator logs quickstart-0123abcd -f
  orchestrator logs quick --rank 1 cluster=kubernetes

Lines of all ranks, each as [aATTEMPT rRANK]; earlier attempts first. -f goes on until the run ends, across restarts."""
CANCEL = """examples:
  orchestrator cancel quickstart-0123abcd
  orchestrator cancel quickstart-0123abcd --now cluster=ray

The run saves its state and stops; `orchestrator resume ID` goes on with it. --now does not wait for the save: what was
computed since the last checkpoint is computed again."""
RESUME = """examples:
  orchestrator resume quickstart-0123abcd
  orchestrator resume quickstart-0123abcd cluster=kubernetes

With the run's own config, from its newest checkpoint on. On this machine the command waits for its end and has its exit
code."""
PULL = """examples:
  orchestrator pull quickstart-0123abcd cluster=kubernetes
  orchestrator pull quickstart-0123abcd cluster=ray --to /mnt/runs --json

Copies the run's folder to this machine, where ls, status and its report are found; what is here already does not come
again. Checkpoints may be a hundred times the rest: --checkpoints brings them too, for evaluate and predict."""
STACK = """examples:
  orchestrator stack quickstart-0123abcd
  orchestrator stack quickstart-0123abcd cluster=kubernetes --json

The Python stack of the main thread of every living rank, innermost call first. The run does not stop for it."""
REMOVE = """examples:
  orchestrator rm quickstart-0123abcd --yes
  orchestrator rm quickstart-0123abcd cluster=kubernetes

On this machine the run's folder, with its checkpoints; on a cluster its objects, the folder stays."""


def add_to(subparsers: Any) -> None:
    logs = add_verb(subparsers, "logs", "what the ranks of a run print", LOGS, show_logs)
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    logs.add_argument("--rank", type=int, metavar="N", help="of this rank alone")
    cancel = add_verb(subparsers, "cancel", "let a run save and stop", CANCEL, cancel_run)
    cancel.add_argument("--now", action="store_true", help="kill it, without saving")
    resume = add_verb(subparsers, "resume", "go on with a run that was stopped", RESUME, resume_run)
    pull = add_verb(subparsers, "pull", "copy a run's folder to this machine", PULL, pull_run)
    pull.add_argument("--to", type=Path, metavar="DIR", help="folder of runs here (default: --runs-dir)")
    pull.add_argument("--checkpoints", action="store_true", help="its checkpoints too")
    stack = add_verb(subparsers, "stack", "where every rank is at this moment", STACK, show_stacks)
    remove = add_verb(subparsers, "rm", "remove a run that has ended", REMOVE, remove_run)
    remove.add_argument("--yes", action="store_true", help="its checkpoints too")
    for parser in (logs, cancel, resume, pull, stack, remove):
        add_id(parser)


def show_logs(args: argparse.Namespace) -> int:
    backend, run_id = open_run(args)
    try:
        if not print_lines(backend.logs(run_id, args.follow, args.rank), args.json):
            who = "no rank" if args.rank is None else f"no rank {args.rank}"
            note(f"run {run_id}: {who} has printed anything; orchestrator status tells where it stands")
    except KeyboardInterrupt:
        note(f"no longer followed; run {run_id} goes on")
        return EXIT_INTERRUPTED
    return EXIT_DONE


def print_lines(lines: Iterable[LogLine], as_json: bool) -> int:
    """Each at once, so that somebody who follows misses nothing; returns how many there were."""
    colored, printed = sys.stdout.isatty(), 0
    for line in lines:
        text = json.dumps(asdict(line), ensure_ascii=False) if as_json else f"{prefix(line, colored)} {line.text}"
        print(text, flush=True)
        printed += 1
    return printed


def prefix(line: LogLine, colored: bool) -> str:
    """`[a1 r0]`, in the rank's color; `[a1]` for a launcher."""
    if line.rank is None:
        return f"[a{line.attempt}]"
    text = f"[a{line.attempt} r{line.rank}]"
    return f"\033[{COLORS[line.rank % len(COLORS)]}m{text}\033[0m" if colored else text


def cancel_run(args: argparse.Namespace) -> int:
    backend, run_id = open_run(args)
    backend.cancel(run_id, args.now)
    if args.json:
        print_json({"run_id": run_id, "asked": "end" if args.now else "save and stop"})
        return EXIT_DONE
    end = same_cluster(args)
    asked = "is killed" if args.now else "was asked to save and stop"
    print(f"run {run_id} {asked}")
    print(f"status      orchestrator status {run_id}{end}")
    print(f"next        orchestrator resume {run_id}{end}")
    return EXIT_DONE


def resume_run(args: argparse.Namespace) -> int:
    backend, run_id = open_run(args)
    code = backend.resume(run_id)
    if code is not None:
        return code
    if args.json:
        print_json({"run_id": run_id, "resumed": True})
    else:
        print(f"run {run_id} goes on\nlogs        orchestrator logs {run_id} -f{same_cluster(args)}")
    return EXIT_DONE


def pull_run(args: argparse.Namespace) -> int:
    backend, run_id = open_run(args)
    folder = backend.pull(run_id, args.to or folder_here(args.runs_dir), args.checkpoints)
    if args.json:
        print_json({"run_id": run_id, "folder": str(folder)})
    else:
        print(f"folder      {folder}\nstatus      orchestrator status {folder}")
    return EXIT_DONE


def show_stacks(args: argparse.Namespace) -> int:
    backend, run_id = open_run(args)
    stacks = backend.stacks(run_id)
    if args.json:
        print_json({str(rank): stack.splitlines() for rank, stack in stacks.items()})
        return EXIT_DONE
    if not stacks:
        note(f"run {run_id}: no rank has come so far that it could tell where it is")
    for rank, stack in stacks.items():
        print(f"rank {rank}, innermost call first")
        print("\n".join(f"  {frame}" for frame in stack.splitlines()))
    return EXIT_DONE


def remove_run(args: argparse.Namespace) -> int:
    backend, run_id = open_run(args)
    _require_yes(args, backend, run_id)
    backend.remove(run_id)
    if args.json:
        print_json({"run_id": run_id, "removed": True})
    else:
        print(f"run {run_id} is removed")
    return EXIT_DONE


def _require_yes(args: argparse.Namespace, backend: Backend, run_id: str) -> None:
    """Checkpoints are hours of work, and on this machine they go with the run's folder."""
    from orchestrator.cluster.local_backend import LocalBackend

    found = sorted((folder_here(args.runs_dir) / run_id / "checkpoints").glob("step_*"))
    if found and isinstance(backend, LocalBackend) and not args.yes:
        way_out = f"orchestrator rm {run_id} --yes"
        raise UserError(f"run {run_id} has {len(found)} checkpoints, the last {found[-1].name}. Way out: {way_out}")
