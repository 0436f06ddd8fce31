"""What happens at each step's border: counting, logging, evaluating, saving, stopping.

Lightning sees one long stream of batches without epochs or validation; an epoch is arithmetic on the step, so a
resumed run is a stream that starts later, and none of Lightning's restart states is involved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from orchestrator.data.stream import Loader
from orchestrator.errors import DataError
from orchestrator.model.ema import ExponentialMovingAverage
from orchestrator.model.module import Classifier
from orchestrator.track.wandb import Tracker
from orchestrator.train.checkpoint import step_folder
from orchestrator.train.divergence import RankCheck, replicated_tensors
from orchestrator.train.evaluate import Evaluation, EvaluationStopped
from orchestrator.train.heartbeat import Heartbeat
from orchestrator.train.ledger import Ledger, PhaseClock
from orchestrator.train.nonfinite import Bookkeeper, describe
from orchestrator.train.outcome import Recorder
from orchestrator.train.pace import Pace, at_own_place, slowest
from orchestrator.train.process import Rank
from orchestrator.train.progress import Progress
from orchestrator.train.requests import Requests
from orchestrator.train.saver import Saved, Saver
from orchestrator.train.signals import StopFlag
from orchestrator.train.state import TrainState
from orchestrator.train.waiting import PeerWait

GIB = 2**30


@dataclass(slots=True)
class Parts:
    """What the loop works with."""

    module: Classifier
    ema: ExponentialMovingAverage | None
    loader: Loader
    evaluate: Callable[[], Evaluation]
    ledger: Ledger
    tracker: Tracker
    progress: Progress
    clock: PhaseClock
    peers: PeerWait
    flag: StopFlag
    requests: Requests
    heartbeat: Heartbeat
    saver: Saver
    manifest: dict[str, Any]
    """What every checkpoint says besides its step and metrics."""
    finite: Bookkeeper
    recorder: Recorder | None
    """Of the first rank."""
    num_samples: int
    """Of the training set."""
    lost: int
    """Samples that this epoch lost before the checkpoint that the attempt goes on from, over all ranks."""
    unjudged: Path | None = None
    """The checkpoint that the attempt goes on from, where a stop came amid its evaluation."""


class StepBorder(pl.Callback):
    """Runs on every rank; only the first one's ledger, tracker and progress do anything."""

    def __init__(self, parts: Parts, rank: Rank, resumed: TrainState | None):
        self.parts, self.rank, self.resumed = parts, rank, resumed
        self.stop_code: int | None = None
        self.last: Evaluation | None = None
        self.pace = Pace(parts.clock, parts.module.step)
        self.saved_at = time.monotonic()
        self.ranks = RankCheck(parts.module.config.compute.check_ranks_every_steps, rank, parts.saver.settle)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.resumed is not None:
            trainer.optimizers[0].load_state_dict(self.resumed.optimizer)
            if self.resumed.scaler:
                trainer.precision_plugin.load_state_dict(self.resumed.scaler)
            self.resumed = None
        self.parts.flag.listen()  # after Lightning installed its own handlers
        # Lightning broadcasts rank 0's SIGTERM before every batch; the flag above covers all ranks and signals.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The start ends where the first batch is there."""
        if batch_idx:
            return
        parts, compiles = self.parts, self.parts.module.config.compute.compile
        parts.ledger.write("first_step", step=parts.module.step, phases=self.pace.take())
        parts.clock.follow("data_wait", lambda: parts.loader.wait_s)
        parts.clock.follow("communication_wait", lambda: parts.peers.seconds)
        parts.clock.rest = "compile" if compiles else "compute"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module, config, span = self.parts.module, self.parts.module.config, self.parts.module.span
        step = module.step
        self.parts.heartbeat.enter("step", step)  # "start" lasts until here: the first step may compile
        if (batch_idx + 1) % self.parts.module.units:
            return
        last = step == span.total_steps
        epoch_ends = last or step % span.steps_per_epoch == 0
        logs = epoch_ends or step == 1 or step % config.tracking.log_every_steps == 0
        self._look_for_bad_steps(is_border=logs)
        if self.parts.ema is not None and step % config.recipe.ema_every_steps == 0 and not module.watch.left_out:
            self.parts.ema.update_parameters(module.net)
        self.parts.progress.tick(step)
        if self.parts.clock.rest == "compile":
            self.parts.ledger.write("compiled", step=step, phases=self.pace.take())
            self.parts.clock.rest = "compute"
        if logs:
            self._log(step)
        self.parts.requests.note_border()
        self.parts.saver.check()
        with self.parts.clock.phase("communication_wait"):
            agreed = self.parts.flag.agree(step, self._is_save_due(step, last))
        self.stop_code = agreed.exit_code
        self._require_sound(trainer, step, agreed.save or epoch_ends)
        if epoch_ends:
            self._report_reading(step)
        metrics = self.evaluate(step) if epoch_ends else {}
        if agreed.save or self.stop_code is not None:
            self._save(trainer, step, metrics)
        trainer.should_stop = self.stop_code is not None

    def _look_for_bad_steps(self, is_border: bool) -> None:
        """End the run where a step's loss or gradient was not finite, or tell of those that were left out."""
        for bad in self.parts.finite.look(is_border):
            facts = self.parts.finite.facts(bad)
            self.parts.ledger.write("left_out", step=bad.number, **facts)
            self.parts.progress.say(f"left out by recipe.on_nan=skip: {describe(bad)}; samples: {facts['path']}")

    def _require_sound(self, trainer: pl.Trainer, step: int, is_judged: bool) -> None:
        """End the attempt where the state that is about to be evaluated or saved is not finite or differs by rank."""
        if is_judged:
            self._look_for_bad_steps(is_border=True)
            self.parts.finite.require_finite_weights(step)
        if self.ranks.due(step, is_judged):
            tensors = replicated_tensors(self.parts.module.net, self.parts.ema, trainer.optimizers[0])
            self.ranks.require_equal(tensors, step)

    def _is_save_due(self, step: int, last: bool) -> bool:
        when, steps_per_epoch = self.parts.module.config.checkpointing, self.parts.module.span.steps_per_epoch
        by_epoch = when.every_epochs and step % (when.every_epochs * steps_per_epoch) == 0
        by_steps = when.every_steps and step % when.every_steps == 0
        by_time = self.rank.world.is_first and 0 < when.every_s <= time.monotonic() - self.saved_at
        return bool(last or by_epoch or by_steps or by_time)

    def _log(self, step: int) -> None:
        """Log sums over all ranks since the last time, and the speed without evaluation and saves."""
        tally = self.parts.module.take_tally().cpu()
        phases, world = self.pace.take(), self.rank.world
        own = at_own_place(self.pace.own_step_s(step), world.rank, world.world_size)
        sums = self._sum(torch.cat([tally, own])).tolist()
        loss, hits1, hits5, count, skipped = sums[:5]
        facts = {
            "epoch": step / self.parts.module.span.steps_per_epoch,
            "train/loss": loss / count if count else None,
            "train/acc1": hits1 / count if count else None,
            "train/acc5": hits5 / count if count else None,
            "train/images": int(count),
            "train/skipped": int(skipped),
            "train/skipped_steps": self.parts.module.watch.skipped,
            "lr": self.parts.module.lr,
            **self.pace.log(step, count),
            **slowest(sums[5:]),
            **memory_gib(self.rank.device),
        }
        self._publish("step", step, facts, phases)
        if count:  # else all were left out
            self.parts.progress.update(step, facts)
        if skipped:
            self.parts.progress.say(f"step {step}: {skipped:.0f} unreadable images left out (data.on_bad=skip)")
        self._require_budget(int(skipped), step)

    def _require_budget(self, skipped: int, step: int) -> None:
        """End the run when an epoch has lost more samples than data.bad_budget allows."""
        parts, budget = self.parts, self.parts.module.config.data.bad_budget
        parts.lost += skipped
        allowed = int(budget * parts.num_samples)
        if parts.lost > allowed:
            raise DataError(
                f"data.bad_budget = {budget:g}: {parts.lost} samples of this epoch could not be used by step {step}, "
                f"at most {allowed} of {parts.num_samples} may be lost. Way out: `orchestrator shards verify` names "
                "them; mend the shards, or raise data.bad_budget"
            )

    def _report_reading(self, step: int) -> None:
        """What reading the epoch took over all ranks, as far as this attempt did it; then its losses are forgotten."""
        counts = self._sum(torch.tensor(self.parts.loader.take_counts())).tolist()
        shards, size, retries, quarantined, _ = counts
        facts = {
            "data/shards_fetched": shards,
            "data/gib_fetched": size / GIB,
            "data/retries": retries,
            "data/shards_quarantined": quarantined,
            "data/samples_lost": self.parts.lost,
        }
        self._publish("data", step, {"epoch": step / self.parts.module.span.steps_per_epoch, **facts})
        if retries or quarantined or self.parts.lost:
            self.parts.progress.say(
                f"step {step}: {shards} shards fetched, {retries} retries, {quarantined} shards found damaged, "
                f"{self.parts.lost} samples lost in this epoch"
            )
        if step % self.parts.module.span.steps_per_epoch == 0:
            self.parts.lost = 0

    def _sum(self, tally: torch.Tensor) -> torch.Tensor:
        if self.rank.control is not None:
            with self.parts.clock.phase("communication_wait"):
                dist.all_reduce(tally, group=self.rank.control)
        return tally

    def _publish(self, kind: str, step: int, facts: dict[str, Any], phases: dict[str, float] | None = None) -> None:
        self.parts.ledger.write(kind, step=step, **facts, **({"phases": phases} if phases else {}))
        self.parts.tracker.log({"global_step": step, **facts})

    def evaluate(self, step: int) -> dict[str, Any]:
        """The metrics of this step; none where all ranks agreed to stop meanwhile, which the next attempt makes up."""
        began = time.perf_counter()
        self.parts.heartbeat.enter("validation", step)
        try:
            with self.parts.clock.phase("evaluation"):
                self.last = self.parts.evaluate()
        except EvaluationStopped as stopped:
            self.stop_code, self.last = stopped.exit_code, None
            return {}
        finally:
            self.parts.heartbeat.enter("step", step)
            self.parts.requests.skip()
        metrics = self.last.metrics()
        seconds = time.perf_counter() - began
        epoch = step / self.parts.module.span.steps_per_epoch
        facts = {"epoch": epoch, **metrics, "skipped": self.last.skipped, "seconds": round(seconds, 3)}
        self._publish("eval", step, facts, self.pace.take())
        acc1 = metrics["val/acc1"]
        self.parts.progress.say(
            f"epoch {epoch:g}  step {step}  val/loss {self.last.loss:.4f}  "
            f"val/acc1 {acc1['value']:.2%} ({acc1['hits']}/{acc1['count']})"
        )
        return metrics

    def _save(self, trainer: pl.Trainer, step: int, metrics: dict[str, Any]) -> None:
        began = time.perf_counter()
        self.parts.heartbeat.enter("save", step)
        epoch = step / self.parts.module.span.steps_per_epoch
        unlogged = self._sum(self.parts.module.tally.detach().cpu().clone()).tolist()
        manifest = {**self.parts.manifest, "step": step, "epoch": epoch, "metrics": metrics}
        manifest |= {"unlogged": unlogged, "lost": self.parts.lost, "left_out": self.parts.module.watch.counts()}
        seconds = self.parts.clock.split()
        with self.parts.clock.phase("checkpoint_stall"):
            self.parts.saver.save(self._state(trainer), manifest, partial(self._tell_saved, began, seconds))
        self.parts.heartbeat.enter("step", step)
        self.parts.requests.skip()
        facts = {"seconds": round(time.perf_counter() - began, 3), "path": f"checkpoints/{step_folder(step)}"}
        self.parts.ledger.write("save", step=step, **facts, phases=self.pace.take())
        self.saved_at = time.monotonic()

    def _tell_saved(self, began: float, seconds: dict[str, float], saved: Saved) -> None:
        """Called by the writer's thread of the first rank, so it must not touch the clock."""
        self.parts.requests.note_save(time.perf_counter() - began)
        self.parts.ledger.write("saved", step=saved.step, write_s=round(saved.write_s, 3))
        if self.parts.recorder is not None:
            self.parts.recorder.saved(saved.step, seconds)

    def _state(self, trainer: pl.Trainer) -> TrainState:
        ema = self.parts.ema.state_dict() if self.parts.ema is not None else None
        scaler = trainer.precision_plugin.state_dict()
        return TrainState(self.parts.module.net.state_dict(), ema, trainer.optimizers[0].state_dict(), scaler)


def memory_gib(device: torch.device) -> dict[str, float | None]:
    """Resident memory of this process, and the peak on its GPU."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    gpu = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    return {"cpu_gib": round(pages * 4096 / GIB, 3), "gpu_gib": gpu}
