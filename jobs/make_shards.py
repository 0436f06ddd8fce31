"""Pack labelled images into WebDataset shards.

    python -m jobs.make_shards digits data/digits
    python -m jobs.make_shards /data/photos data/photos --workers 16 --on-bad skip

The same as `orchestrator shards make`.
"""

from __future__ import annotations

import argparse
import sys

from orchestrator.cli.main import Parser, run_verb
from orchestrator.cli.shards import MAKE_EPILOG, add_make_arguments


def main() -> int:
    parser = Parser(epilog=MAKE_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_make_arguments(parser)
    return run_verb(parser.parse_args(), "interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
