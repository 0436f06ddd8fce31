"""Verbs that explain: snapshot writes down what a cluster says of a run, why reads causes out of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.backends import add_id, add_verb, choose_backend, open_run
from orchestrator.cli.console import note, print_json
from orchestrator.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from orchestrator.cluster.snapshot import Snapshot
    from orchestrator.cluster.why.cause import Cause
    from orchestrator.cluster.why.verdict import Answer

WHY = """examples:
  orchestrator why quickstart-0123abcd
  orchestrator why quickstart-0123abcd cluster=kubernetes --json
  orchestrator why --snapshot cluster.json

The first cause is the one to mend first. Exit code: 0 nothing is wrong, 75 what is wrong may pass by itself, 42 it
needs somebody. --snapshot FILE asks no cluster: FILE is of `orchestrator snapshot`, or of `kubectl get ... -o json`."""
SNAPSHOT = """examples:
  orchestrator snapshot quickstart-0123abcd cluster=kubernetes -o snapshot.json
  orchestrator snapshot cluster=kubernetes -o cluster.json

All that `why` looks at, as one JSON file to attach to a question: objects, events, the run's last lines. Names of
secrets are in it, values are not. Without an ID it is the cluster alone."""

NO_RIGHT = "no right to "
WIDE = 240
"""Characters of a piece of evidence."""


def add_to(subparsers: Any) -> None:
    why = add_verb(subparsers, "why", "why a run is stuck, or why it ended", WHY, explain_run)
    why.add_argument("--snapshot", type=Path, action="append", default=[], metavar="FILE", help="ask a file instead")
    add_id(why, "?")
    snapshot = add_verb(subparsers, "snapshot", "what a cluster says of a run, as a file", SNAPSHOT, write_snapshot)
    snapshot.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (default: print it)")
    snapshot.add_argument("run_id", nargs="?", metavar="ID", help="of the run, or its beginning")


def write_snapshot(args: argparse.Namespace) -> int:
    from orchestrator.files import write_json

    taken = _take(args, args.run_id is not None)
    if args.output is None:
        print_json(taken.facts())
        return EXIT_DONE
    write_json(args.output, taken.facts())
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in taken.objects.items() if found)
    about = {"snapshot": str(args.output), "run_id": taken.run_id, "missing": dict(taken.missing)}
    if args.json:
        print_json(about)
        return EXIT_DONE
    print(f"snapshot    {args.output}: {counts or 'nothing'}")
    for kind, why in sorted(taken.missing.items()):
        note(f"not read: {kind}: {why}")
    if taken.run_id:
        print(f"why         orchestrator why --snapshot {args.output}")
    return EXIT_DONE


def explain_run(args: argparse.Namespace) -> int:
    from orchestrator.cluster.why.verdict import explain

    answer = _of_file(args) if args.snapshot else explain(_take(args, True), args.run_id)
    if args.json:
        print_json(answer.facts())
    else:
        print("\n".join(told(answer)))
    return answer.exit_code


def _of_file(args: argparse.Namespace) -> Answer:
    from orchestrator.cluster.snapshot import read_snapshot
    from orchestrator.cluster.why.verdict import explain

    try:
        return explain(read_snapshot(args.snapshot), args.run_id)
    except (
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # a file that somebody has edited: anything may be missing
        rule = f"holds objects that no cluster writes ({type(error).__name__}: {error})"
        way_out = "the file as `orchestrator snapshot` or kubectl wrote it"
        raise UserError(f"--snapshot {args.snapshot[0]}: {rule}. Way out: {way_out}") from error


def _take(args: argparse.Namespace, with_run: bool) -> Snapshot:
    if not with_run:
        return choose_backend(args).snapshot(None)
    backend, args.run_id = open_run(args)
    return backend.snapshot(args.run_id)


def told(answer: Answer) -> list[str]:
    """The answer as a person reads it."""
    if not answer.causes:
        lines = [f"run {answer.run_id}: nothing is wrong: {answer.said}"]
    else:
        lines = [f"run {answer.run_id}: {answer.said}"]
        for place, cause in enumerate(answer.causes, start=1):
            lines += _cause(f"{place}.", cause)
    if answer.earlier:
        lines += ["met before, and over:", *(f"   {cause.said} ({cause.name})" for cause in answer.earlier)]
    return [*lines, *(_unread(answer) if answer.causes else ())]


def _unread(answer: Answer) -> list[str]:
    """What there was no right to read, in one line."""
    whole = [one for one in answer.unread if ": only" not in one]
    rights = [one.partition(NO_RIGHT)[2].split()[-1] for one in whole if f": {NO_RIGHT}" in one]
    others = [f"not read: {one}" for one in whole if f": {NO_RIGHT}" not in one]
    return [*others, *([f"not read: no right to read {', '.join(rights)}"] if rights else [])]


def _cause(head: str, cause: Cause) -> list[str]:
    pods = f" ({len(cause.whom)} pods)" if len(cause.whom) > 1 else ""
    proof = [f"     {one.object}  {one.field}: {_short(one.value)}" for one in cause.evidence]
    return [f"{head} {cause.name}: {cause.said}{pods}", *proof, f"   way out: {cause.way_out}"]


def _short(text: str) -> str:
    """--json has the whole of it."""
    return text if len(text) <= WIDE else f"{text[:WIDE]} ..."
