"""One attempt of one run on one rank: the one place where data, model, checkpoints, signals and records meet."""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch.distributed as dist

from orchestrator.bundle import Bundle
from orchestrator.config import RunConfig
from orchestrator.data.decode import decoder_notice
from orchestrator.errors import EXIT_RESIZED, EXIT_STOPPED, ConfigError, StopRequested
from orchestrator.files import read_json
from orchestrator.options import Precision
from orchestrator.train import checkpoint
from orchestrator.train.assembly import Job, assemble
from orchestrator.train.beats import Beats
from orchestrator.train.checkpoint import TrainState
from orchestrator.train.evaluate import Evaluation, EvaluationStopped
from orchestrator.train.heartbeat import Heartbeat, heartbeat_file
from orchestrator.train.ledger import PhaseClock
from orchestrator.train.loop import Parts, StepBorder
from orchestrator.train.outcome import Recorder, mirror_result, mirror_time, write_evaluation
from orchestrator.train.preflight import class_names
from orchestrator.train.process import Rank, choose_device, join_group, prepare_arithmetic
from orchestrator.train.signals import StopFlag
from orchestrator.train.trainer import build_trainer
from orchestrator.world import World

MIRROR_S = 300.0
"""What the end of a run waits for the store of its checkpoints."""
STOP_MIRROR_S = 5.0
"""What W&B may cost when the run was asked to stop."""


def fit(bundle: Bundle, world: World, attempt: int, began: float, terminal: IO[str]) -> None:
    """Train, from the newest checkpoint on, to the end or to a request to stop.

    `began` is the time.time() at which the attempt started. Raises StopRequested after saving, OrchestratorError
    for what a user or the machine must mend.
    """
    clock = PhaseClock(began)
    clock.add("import", time.time() - began)
    flag = StopFlag()
    flag.listen()
    heartbeat = Heartbeat(heartbeat_file(bundle.folder, attempt, world.rank))
    device = choose_device(bundle.config.compute, world)
    require_precision(bundle.config, device)
    prepare_arithmetic(bundle.config.compute, device)
    rank = Rank(world, device, attempt, terminal, join_group(world, device), heartbeat)
    flag.join(rank.control)
    job, parts, resumed = assemble(bundle, rank, clock, flag)
    try:
        _train(job, parts, resumed)
    finally:
        parts.progress.stop()
        parts.saver.close()
        parts.ledger.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def require_precision(config: RunConfig, device: torch.device) -> None:
    """Refuse arithmetic that the device cannot do."""
    if config.compute.precision is Precision.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("compute.precision", "bf16", "this GPU has no bf16", "compute.precision=fp16")


def _train(job: Job, parts: Parts, resumed: TrainState | None) -> None:
    span, module = job.span, parts.module
    parts.ledger.write("start", step=span.first_step, **_start_facts(job, parts), phases=parts.clock.take())
    if notice := decoder_notice(job.config.data.decode):
        parts.progress.say(notice)
    if span.first_step:
        parts.progress.say(f"resuming at step {span.first_step} of {span.total_steps}")
    parts.heartbeat.beat(span.first_step)
    border = StepBorder(parts, job.rank, resumed)
    border.stop_code = parts.flag.agree(span.first_step).exit_code
    if parts.unjudged is not None and border.stop_code is None:
        _make_up_for_evaluation(parts, border, parts.unjudged)
    if span.first_step < span.total_steps and border.stop_code is None:
        parts.progress.start(span.total_steps, span.first_step)
        callbacks = [border, parts.peers, Beats(parts.heartbeat)]
        build_trainer(module, job.rank, callbacks).fit(module, train_dataloaders=parts.loader)
        parts.progress.stop()
    parts.heartbeat.enter("save", module.step)
    with parts.clock.phase("checkpoint_stall"):
        parts.saver.wait(MIRROR_S if border.stop_code is None else min(MIRROR_S, job.config.cluster.grace_s / 2))
    parts.heartbeat.enter("end", module.step)
    parts.ledger.write("trained", step=module.step, phases=parts.clock.take())
    parts.clock.rest = "finish"
    evaluation = border.last if module.step == span.total_steps else None
    if border.stop_code is None and evaluation is None:
        evaluation = _evaluate_again(parts)
    if evaluation is None:
        assert border.stop_code is not None
        _stop(parts, border.stop_code)
    if parts.recorder is not None:
        _finish(job, parts, parts.recorder, evaluation)
    parts.ledger.write("end", step=module.step, exit_code=0, phases=parts.clock.take())


def _make_up_for_evaluation(parts: Parts, border: StepBorder, folder: Path) -> None:
    """Evaluate the checkpoint whose evaluation a stop cut short, and put its metrics down as if nothing had been."""
    metrics = border.evaluate(parts.module.step)
    if metrics and parts.recorder is not None:
        checkpoint.add_metrics(folder, metrics)


def _evaluate_again(parts: Parts) -> Evaluation:
    """The last evaluation of a run whose earlier attempt ended between its last save and its end."""
    parts.heartbeat.enter("validation", parts.module.step)
    try:
        with parts.clock.phase("evaluation"):
            return parts.evaluate()
    except EvaluationStopped as stopped:
        _stop(parts, stopped.exit_code)
    finally:
        parts.heartbeat.enter("end", parts.module.step)


def _start_facts(job: Job, parts: Parts) -> dict[str, Any]:
    """What a reader of the events needs to tell how far the attempt is, what it costs and when it began."""
    span, device = job.span, job.rank.device
    return {
        "began": parts.clock.began,
        "world_size": span.world_size,
        "virtual_ranks": span.virtual_ranks,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "total_steps": span.total_steps,
        "steps_per_epoch": span.steps_per_epoch,
        "num_samples": parts.num_samples,
    }


def _stop(parts: Parts, exit_code: int) -> NoReturn:
    step = parts.module.step
    parts.ledger.write("stop", step=step, exit_code=exit_code, phases=parts.clock.take())
    if parts.recorder is not None:
        if step and exit_code != EXIT_RESIZED:  # before the first step there is nothing that a result could tell
            parts.recorder.stopped(step, exit_code)
        if exit_code == EXIT_STOPPED:
            parts.requests.obeyed()
        mirror_time(parts.tracker, parts.recorder.bundle.folder)
        parts.tracker.finish(timeout_s=STOP_MIRROR_S, exit_code=exit_code)
    raise StopRequested(f"stopped after saving step {step}", exit_code)


def _finish(job: Job, parts: Parts, recorder: Recorder, evaluation: Evaluation) -> None:
    """Everything the first rank leaves at the end of a run."""
    folder, sets, pixels = job.bundle.folder, job.sets, job.config.data.max_pixels
    classes = class_names(sets.train, sets.num_classes)
    record = write_evaluation(folder, evaluation, parts.module.step, sets.val, classes, pixels)
    recorder.done(parts.module.step, evaluation)
    mirror_result(
        parts.tracker, folder, record, read_json(folder / "result.json"), job.config.tracking.upload_checkpoint
    )
    note = parts.tracker.finish()
    if note:
        parts.progress.say(note)
