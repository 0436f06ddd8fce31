"""What becomes of a step whose loss or gradient was not finite: its samples are named, and the run ends or goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.data.index import ShardIndex
from orchestrator.data.reader import ShardReader
from orchestrator.errors import ConfigError
from orchestrator.files import disk_errors
from orchestrator.model.finite import JudgedStep, has_finite_weights
from orchestrator.model.module import Classifier
from orchestrator.train.process import Rank

MOST_IN_A_ROW = 10
SHOWN = 20
FOLDER = "nonfinite"


@dataclass(frozen=True, slots=True)
class BadStep:
    """A step that was not finite, as all ranks know it."""

    number: int
    ranks: tuple[int, ...]
    """Those whose own loss was not; all of them where every loss was and the gradient was not."""
    by_loss: bool
    ids: tuple[tuple[int, ...], ...]
    """Samples of each of `ranks`."""

    @property
    def count(self) -> int:
        return sum(map(len, self.ids))


class Bookkeeper:
    """Looks at what the watch of the module has judged; one per rank."""

    def __init__(self, module: Classifier, rank: Rank, index: ShardIndex, folder: Path, settle: Callable[[], None]):
        """`settle` lets a save end that is under way, so that an end loses no good step; collective."""
        self._module, self._rank, self._index, self._folder = module, rank, index, folder
        self._settle = settle

    def look(self, is_border: bool) -> list[BadStep]:
        """The bad steps since the last look; collective where there is one.

        On a GPU, steps that are not left out are looked at only where the run waits for the device anyway
        (`is_border`). Raises ConfigError where the run may not go on.
        """
        watch = self._module.watch
        if not (watch.skips or is_border or self._rank.device.type == "cpu"):
            return []
        steps = watch.take()
        bad = [self._gather(step) for step, is_bad in zip(steps, self._flags(steps), strict=True) if is_bad]
        if bad:
            write_samples(self._folder, bad, self._index, self._rank.world.is_first)
        if bad and (not watch.skips or watch.in_a_row > MOST_IN_A_ROW):
            self._end(bad[0] if not watch.skips else bad[-1])
        return bad

    def require_finite_weights(self, step: int) -> None:
        """Refuse to save what no step can go on from: a finite gradient may have been too much for a finite weight."""
        if not bool(has_finite_weights(self._module.net)):
            self._settle()
            raise self._error(f"the weights are not finite after step {step}")

    def facts(self, bad: BadStep) -> dict[str, Any]:
        """What the events say of a step that was left out."""
        path = samples_file(self._folder, bad.number)
        return {"ranks": list(bad.ranks), "samples": bad.count, "path": str(path.relative_to(self._folder))}

    def _flags(self, steps: Sequence[JudgedStep]) -> list[bool]:
        if not steps:
            return []
        flags = torch.stack([step.bad for step in steps]).to(torch.int32).cpu()
        if not self._module.watch.agreed and self._rank.control is not None:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._rank.control)
        return flags.bool().tolist()

    def _gather(self, step: JudgedStep) -> BadStep:
        """Put together what each rank knows."""
        ids = step.ids[step.ids >= 0]
        rows = [[int(step.bad_loss), len(ids)]]
        numbers = [ids]
        if self._rank.control is not None:
            rows = [row.tolist() for row in self._rank.all_gather(torch.tensor(rows[0]))]
            padded = torch.full((max(count for _, count in rows),), -1, dtype=torch.int64)
            padded[: len(ids)] = ids
            numbers = [row[row >= 0] for row in self._rank.all_gather(padded)]
        by_loss = any(bad for bad, _ in rows)
        ranks = tuple(rank for rank, (bad, _) in enumerate(rows) if bad or not by_loss)
        return BadStep(step.number, ranks, by_loss, tuple(tuple(numbers[rank].tolist()) for rank in ranks))

    def _end(self, bad: BadStep) -> None:
        self._settle()
        self._rank.speak_after(bad.ranks)
        watch = self._module.watch
        rows = f" ({watch.in_a_row} steps in a row, at most {MOST_IN_A_ROW} are left out)" if watch.skips else ""
        raise self._error(f"{describe(bad)}{rows}; {name_samples(bad, self._index, self._folder)}")

    def _error(self, what: str) -> ConfigError:
        policy = "skip" if self._module.watch.skips else "stop"
        way_out = (
            f"look at these images, a lower optimizer.lr (peak now {self._module.peak_lr:g}), a longer "
            "recipe.warmup_epochs, or recipe.clip_norm=1"
        )
        if policy == "stop":
            way_out += "; recipe.on_nan=skip leaves such steps out"
        return ConfigError("recipe.on_nan", policy, f"training diverged: {what}", way_out)


def describe(bad: BadStep) -> str:
    ranks = f"rank{'s' if len(bad.ranks) > 1 else ''} {', '.join(map(str, bad.ranks))}"
    if bad.by_loss:
        return f"the loss of {ranks} is not finite in step {bad.number}"
    return f"the gradient is not finite in step {bad.number}, though each loss is"


def name_samples(bad: BadStep, index: ShardIndex, folder: Path) -> str:
    """How many samples the ranks at fault had there, the first of them, and where all are listed."""
    places = [place for _, place in _places(bad, index, SHOWN)]
    more = f" ... all in {samples_file(folder, bad.number)}" if bad.count > len(places) else ""
    return f"its {bad.count} samples there are {', '.join(places)}{more}"


def write_samples(folder: Path, steps: Sequence[BadStep], index: ShardIndex, is_first: bool) -> None:
    """List the samples of each step, one a line with its rank; the first rank writes."""
    for bad in steps if is_first else ():
        path = samples_file(folder, bad.number)
        lines = [f"rank {rank}  {place}\n" for rank, place in _places(bad, index, bad.count)]
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(lines))


def samples_file(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"step_{step:08d}.txt"


def _places(bad: BadStep, index: ShardIndex, limit: int) -> Iterator[tuple[int, str]]:
    """Rank and place of the first `limit` samples."""
    pairs = [(rank, id) for rank, ids in zip(bad.ranks, bad.ids, strict=True) for id in ids]
    with closing(ShardReader(index)) as reader:
        for rank, id in pairs[:limit]:
            shard, _, rest = reader.place(id).partition(", member ")
            yield rank, f"{shard.rpartition('/')[2]}: {rest.partition(', offset')[0]}"
