"""Pack labelled images into WebDataset shards.

    python -m jobs.make_shards digits data/digits
    python -m jobs.make_shards /data/photos data/photos --workers 16 --on-bad skip

The same as `orchestrator shards make`.
"""

from __future__ import annotations

import argparse
import sys

from orchestrator.cli.console import note
from orchestrator.cli.main import Parser
from orchestrator.cli.shards import MAKE_EPILOG, add_make_arguments
from orchestrator.errors import EXIT_INTERRUPTED, OrchestratorError


def main() -> int:
    parser = Parser(epilog=MAKE_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_make_arguments(parser)
    args = parser.parse_args()
    try:
        return args.run(args)
    except OrchestratorError as error:
        note(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        note("interrupted; the same command goes on")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
