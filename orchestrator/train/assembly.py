"""What an attempt is made of: sets, plan, network, checkpoint and records, put together on each rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from orchestrator.bundle import Bundle
from orchestrator.config import RunConfig
from orchestrator.data.order import EvalPlan, TrainPlan
from orchestrator.data.stream import Batch, Split, eval_loader, train_loader
from orchestrator.data.transforms import preprocessing_of
from orchestrator.model.ema import ExponentialMovingAverage
from orchestrator.model.module import Classifier, Span
from orchestrator.model.weights import load_weights
from orchestrator.model.zoo import build_model
from orchestrator.plain import to_dict
from orchestrator.track import wandb
from orchestrator.track.wandb import NullTracker, Tracker
from orchestrator.train import checkpoint
from orchestrator.train.checkpoint import Checkpoint, TrainState
from orchestrator.train.evaluate import Evaluation, EvaluationStopped, evaluate
from orchestrator.train.initial import start_from
from orchestrator.train.ledger import Ledger, PhaseClock
from orchestrator.train.loop import Parts
from orchestrator.train.nonfinite import Bookkeeper
from orchestrator.train.outcome import Recorder
from orchestrator.train.preflight import Sets, class_names, open_sets, total_steps
from orchestrator.train.process import Rank
from orchestrator.train.progress import Progress, open_progress
from orchestrator.train.requests import Requests
from orchestrator.train.resume import claim, open_mirror, resume_point
from orchestrator.train.saver import Saver
from orchestrator.train.signals import StopFlag
from orchestrator.train.virtual_choice import agree_on_virtual_ranks
from orchestrator.train.waiting import PeerWait


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


def assemble(bundle: Bundle, rank: Rank, clock: PhaseClock, flag: StopFlag) -> tuple[Job, Parts, TrainState | None]:
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
