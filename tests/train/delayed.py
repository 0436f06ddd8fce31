"""A real run that is slower than it should be, by so much: `python delayed.py DELAYS.json OVERRIDE...`.

DELAYS.json: seconds that a batch takes longer to load (`loader`), and a step longer to compute by rank (`step`).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def rank(bundle: str, delays: dict[str, Any], *arguments: Any) -> None:
    """What each process runs: jobs.train.rank, slowed down."""
    import jobs.train
    from orchestrator.data.stream import Filler
    from orchestrator.model.module import Classifier
    from orchestrator.world import read_world

    slow_down(Filler, "fill", delays["loader"])
    slow_down(Classifier, "training_step", delays["step"][read_world().rank])
    jobs.train.rank(bundle, *arguments)


def slow_down(owner: type, name: str, seconds: float) -> None:
    original = getattr(owner, name)

    def slower(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return original(*args, **kwargs)

    setattr(owner, name, slower)


def main(delays: str, overrides: list[str]) -> int:
    from orchestrator.bundle import freeze, write_bundle
    from orchestrator.cluster import local
    from orchestrator.compose import compose

    local.warm_up()
    bundle = freeze(compose(overrides))
    write_bundle(bundle, bundle.folder / "run.json", {})
    place = str(bundle.folder / "run.json")
    ended = local.run_attempts(bundle, rank, (place, json.loads(Path(delays).read_text())))
    print(ended.error or bundle.folder)
    return ended.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
