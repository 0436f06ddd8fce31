"""One attempt of one run on one rank: the one place where data, model, checkpoints, signals and records meet."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.bundle import Bundle
from orchestrator.config import RunConfig
from orchestrator.data.decode import decoder_notice
from orchestrator.data.order import EvalPlan, TrainPlan
from orchestrator.data.stream import Batch, Split, eval_loader, train_loader
from orchestrator.data.transforms import preprocessing_of
from orchestrator.errors import EXIT_RESIZED, EXIT_STOPPED, ConfigError, StopRequested
from orchestrator.files import read_json
from orchestrator.model.ema import ExponentialMovingAverage
from orchestrator.model.module import Classifier, Span
from orchestrator.model.weights import load_weights
from orchestrator.model.zoo import build_model
from orchestrator.options import Precision
from orchestrator.plain import to_dict
from orchestrator.track import wandb
from orchestrator.track.wandb import NullTracker, Tracker
from orchestrator.train import checkpoint
from orchestrator.train.beats import Beats
from orchestrator.train.checkpoint import Checkpoint, TrainState
from orchestrator.train.evaluate import Evaluation, EvaluationStopped, evaluate
from orchestrator.train.heartbeat import Heartbeat, heartbeat_file
from orchestrator.train.initial import start_from
from orchestrator.train.ledger import Ledger, PhaseClock
from orchestrator.train.loop import Parts, StepBorder
from orchestrator.train.nonfinite import Bookkeeper
from orchestrator.train.outcome import Recorder, mirror_result, mirror_time, write_evaluation
from orchestrator.train.preflight import Sets, class_names, open_sets, total_steps
from orchestrator.train.process import Rank, choose_device, join_group, prepare_arithmetic
from orchestrator.train.progress import Progress, open_progress
from orchestrator.train.requests import Requests
from orchestrator.train.resume import claim, open_mirror, resume_point
from orchestrator.train.saver import Saver
from orchestrator.train.signals import StopFlag
from orchestrator.train.trainer import build_trainer
from orchestrator.train.virtual_choice import agree_on_virtual_ranks
from orchestrator.train.waiting import PeerWait
from orchestrator.world import World

MIRROR_S = 300.0
"""What the end of a run waits for the store of its checkpoints."""
STOP_MIRROR_S = 5.0
"""What W&B may cost when the run was asked to stop."""


@dataclass(frozen=True, slots=True)
class Job:
    """What an attempt is made of before anything is computed."""

    bundle: Bundle
    rank: Rank
    sets: Sets
    plan: TrainPlan
    span: Span

    @property
    def config(self) -> RunConfig:
        return self.bundle.config


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
    job, parts, resumed = _assemble(bundle, rank, clock, flag)
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


def _assemble(bundle: Bundle, rank: Rank, clock: PhaseClock, flag: StopFlag) -> tuple[Job, Parts, TrainState | None]:
    config, world = bundle.config, rank.world
    sets = open_sets(config)
    plan = sets.plan(config)
    fence = claim(bundle, rank)
    saver = Saver(config.checkpointing, rank, fence, open_mirror(bundle, fence))
    found = resume_point(bundle, rank, sets)
    virtual_ranks = agree_on_virtual_ranks(bundle, rank, found.manifest if found else {})
    plan.require_fits(virtual_ranks or world.world_size, config.recipe.accumulate)
    steps = total_steps(config, plan.steps_per_epoch)
    first = found.step if found else 0
    span = Span(first, steps, plan.steps_per_epoch, world.rank, world.world_size, virtual_ranks)
    job = Job(bundle, rank, sets, plan, span)
    net = build_net(config, sets.num_classes, rank.device)
    started = start_from(bundle.initial, net) if bundle.initial and not found else None
    ema = ExponentialMovingAverage(net, config.recipe.ema_decay) if config.recipe.ema_decay else None
    module = Classifier(net, config, span)
    state = _restore(found, module, ema) if found else None
    parts = _wire(job, module, ema, clock, flag, saver)
    parts.lost = found.manifest["lost"] if found else 0
    if started:
        parts.progress.say(started)
    if found and found.step % plan.steps_per_epoch == 0 and not found.manifest["metrics"]:
        parts.unjudged = found.folder
    return job, parts, state


def _restore(found: Checkpoint, module: Classifier, ema: ExponentialMovingAverage | None) -> TrainState:
    """Put a checkpoint's weights in place; the optimizer takes its part once Lightning has built it."""
    state = found.load_state()
    way_out = "move that folder away, or train with name=..."
    checkpoint.fill(module.net, state.model, found.folder, way_out)
    if ema is not None and state.ema is not None:
        checkpoint.fill(ema, state.ema, found.folder, way_out)
    if module.span.rank == 0:
        module.add_tally(found.manifest["unlogged"])
    module.watch.resume(found.manifest.get("left_out", {}))
    return state


def build_net(config: RunConfig, num_classes: int, device: torch.device) -> nn.Module:
    """The network with its first weights, the same on every rank."""
    torch.manual_seed(config.seed)
    net = build_model(config.model, num_classes)
    if config.model.weights:
        load_weights(config.model.weights, net, replace_head=True)
    net.to(device)
    if config.compute.channels_last:
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.compute.compile:
        net.compile()
    return net


def _wire(
    job: Job,
    module: Classifier,
    ema: ExponentialMovingAverage | None,
    clock: PhaseClock,
    flag: StopFlag,
    saver: Saver,
) -> Parts:
    config, rank, span, sets = job.config, job.rank, job.span, job.sets
    world, limit_s = rank.world, config.compute.max_time_s
    requests = Requests(job.bundle.folder, rank.attempt, clock.began + limit_s if limit_s else None)
    if world.is_first:
        flag.ask(requests.read)
    train = Split(sets.train, config.data, config.seed, sets.num_classes, world.rank, world.world_size, span.slices)
    steps = range(span.first_step, span.total_steps)
    folder = job.bundle.folder
    progress = open_progress(rank.terminal) if world.is_first else Progress()
    recorder = Recorder(job.bundle, rank, clock, sets.train.digest, span.steps_per_epoch)
    ledger = Ledger(folder, world.rank, rank.attempt)
    return Parts(
        module=module,
        ema=ema,
        loader=train_loader(job.plan, train, config.recipe.accumulate, steps, rank.device),
        evaluate=partial(_evaluate, job, module, ema, flag),
        ledger=ledger,
        tracker=_open_tracker(job, progress, ledger) if world.is_first else NullTracker(),
        progress=progress,
        clock=clock,
        peers=PeerWait(rank.device),
        flag=flag,
        requests=requests,
        heartbeat=rank.heartbeat,
        saver=saver,
        manifest=_manifest(job),
        finite=Bookkeeper(module, rank, sets.train, folder, saver.settle),
        recorder=recorder if world.is_first else None,
        num_samples=sets.train.num_samples,
        lost=0,
    )


def _open_tracker(job: Job, progress: Progress, ledger: Ledger) -> Tracker:
    bundle, config = job.bundle, job.config

    def tell(url: str) -> None:
        ledger.write("wandb", step=job.span.first_step, url=url)
        progress.say(f"W&B run: {url}")

    facts = {
        **to_dict(config),
        "run_id": bundle.run_id,
        "config_hash": bundle.config_hash,
        "data_digests": job.sets.facts(),
    }
    return wandb.start(config.tracking, bundle.folder, bundle.run_id, config.name, facts, tell)


def _evaluate(job: Job, module: Classifier, ema: ExponentialMovingAverage | None, flag: StopFlag) -> Evaluation:
    config, world = job.config, job.rank.world
    plan = EvalPlan(job.sets.val.num_samples, config.eval_batch_size, world.world_size)
    split = Split(job.sets.val, config.data, config.seed, job.sets.num_classes, world.rank, world.world_size)
    net = ema.module if ema is not None else module.net
    batches = job.rank.heartbeat.following(eval_loader(plan, split, job.rank.device))
    module.normalise.to(job.rank.device)
    return evaluate(net, module.normalise, _until_stopped(batches, flag, module.step), job.sets.num_classes)


def _until_stopped(batches: Iterable[Batch], flag: StopFlag, step: int) -> Iterator[Batch]:
    """Ask before each batch whether all shall stop. Raises EvaluationStopped on every rank."""
    for batch in batches:
        agreed = flag.agree(step)
        if agreed.exit_code is not None:
            raise EvaluationStopped(agreed.exit_code)
        yield batch


def _manifest(job: Job) -> dict[str, Any]:
    config, sets = job.config, job.sets
    return {
        "run_id": job.bundle.run_id,
        "attempt": job.rank.attempt,
        "world_size": job.rank.world.world_size,
        "virtual_ranks": job.span.virtual_ranks,
        "config_hash": job.bundle.config_hash,
        "code_digest": job.bundle.code_digest,
        "data_digest": sets.train.digest,
        "model": {**to_dict(config.model), "num_classes": sets.num_classes},
        "classes": class_names(sets.train, sets.num_classes),
        "preprocessing": asdict(preprocessing_of(config.data)),
        "total_steps": job.span.total_steps,
        "best_by": config.checkpointing.metric,
    }


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
