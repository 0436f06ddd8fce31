"""``orchestrator VERB [ID|PATH ...] [key=value ...] [--flag]``: what has an identifier before ``=`` is an override."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from orchestrator import __version__
from orchestrator.cli import checkpoints, doctor, lifecycle, plan, runs, shards, status, why
from orchestrator.cli.backends import runs_place
from orchestrator.cli.console import note
from orchestrator.errors import EXIT_INTERRUPTED, EXIT_USER, OrchestratorError, nearest

OVERRIDE = re.compile(r"[+~]*[A-Za-z_][\w./@-]*=")
EPILOG = """examples:
  orchestrator shards make digits data/digits
  orchestrator train experiment=quickstart

exit codes: 0 done, 42 your input, 43 no progress, 44 this machine, 45 stopped on request, 75 try again,
130 Ctrl-C after saving, 143 SIGTERM after saving"""


class Parser(argparse.ArgumentParser):
    """Usage errors end with the user's exit code and the nearest match instead of argparse's 2."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if choice:
            known = re.findall(r"'([^']+)'", choice.group(2)) or choice.group(2).split(", ")
            message = f"{choice.group(1)!r} is no command here: {nearest(choice.group(1), known)}"
        note(f"error: {message}. Way out: {self.prog} --help")
        sys.exit(EXIT_USER)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="orchestrator",
        description="Train image models on clusters: one Hydra config, exact data, runs that survive.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for family in (runs, plan, status, why, lifecycle, checkpoints, shards, doctor):
        family.add_to(subparsers)
    return parser


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides wherever they stand, and the rest; after ``--`` nothing is an override."""
    border = arguments.index("--") if "--" in arguments else len(arguments)
    before = arguments[:border]
    overrides = [argument for argument in before if OVERRIDE.match(argument)]
    return overrides, [*(argument for argument in before if not OVERRIDE.match(argument)), *arguments[border:]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    overrides, rest = split_overrides(list(sys.argv[1:] if arguments is None else arguments))
    args = parser.parse_args(rest)
    if hasattr(args, "runs_dir"):  # verbs that read runs need no config, but this one key of it is typed from habit
        typed = [override.partition("=")[2] for override in overrides if override.startswith("runs_dir=")]
        args.runs_dir = runs_place(typed[-1]) if typed else args.runs_dir
        overrides = [override for override in overrides if not override.startswith("runs_dir=")]
    if overrides and not getattr(args, "takes_overrides", False):
        parser.error(f"{overrides[0]} is an override, and {args.verb} takes none (put it after -- if it is a path)")
    args.overrides = overrides
    return run_verb(args, "interrupted")


def run_verb(args: argparse.Namespace, on_interrupt: str) -> int:
    """Run a parsed verb; what a user must know of its end is one line on stderr and the exit code."""
    try:
        return args.run(args)
    except OrchestratorError as error:
        note(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        note(on_interrupt)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
