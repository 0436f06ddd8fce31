"""Pack labelled images into WebDataset shards.

    python -m jobs.make_shards digits data/digits
    python -m jobs.make_shards /data/photos data/photos --workers 16 --on-bad skip

The same as `orchestrator shards make` on this machine.
"""

from __future__ import annotations

import argparse
import signal
import sys

from orchestrator.cli.main import Parser, run_verb
from orchestrator.cli.shards_make import EPILOG, add_make_arguments
from orchestrator.errors import EXIT_TERMINATED


def main() -> int:
    signal.signal(signal.SIGTERM, _end)
    parser = Parser(epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_make_arguments(parser)
    return run_verb(parser.parse_args(), "interrupted; the same command goes on")


def _end(number: int, frame: object) -> None:
    """A container's first process is never ended by a signal that it does not handle."""
    sys.exit(EXIT_TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
