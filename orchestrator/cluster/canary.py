"""The canary of a run: three steps of its own config in a scratch folder, each part checked and timed.

The ranks train from the frozen bundle as the run's would, save after the second step and go on; other ranks, where the
slices of a step allow another number of them, repeat the third step from that checkpoint and must get the same bits.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import probes, verdicts
from orchestrator.bundle import Bundle, load_bundle, with_config, write_bundle
from orchestrator.cluster.cause import Ended
from orchestrator.cluster.estimate import Timing, estimate_hours, read_timing
from orchestrator.cluster.local import num_processes, run_attempts
from orchestrator.cluster.places import visible_gpus
from orchestrator.config import RunConfig
from orchestrator.data.index import Shard, ShardIndex
from orchestrator.data.verify import require_readable
from orchestrator.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USER, OrchestratorError
from orchestrator.files import disk_errors, read_json, write_json
from orchestrator.options import TrackingMode
from orchestrator.train import checkpoint
from orchestrator.train.heartbeat import heartbeat_file, read_sign
from orchestrator.train.preflight import Sets, check_run, total_steps
from orchestrator.train.virtual import serves
from orchestrator.world import read_world

STEPS = 3
SERVER_TIMEOUT_S = 3.0
INTERRUPTED = {EXIT_INTERRUPTED, EXIT_TERMINATED}
DECODED = 16
"""Images of each shard that is looked into."""
PARTS = {
    "start": "start of the processes",
    "step": "train steps",
    "validation": "validation",
    "save": "checkpoint",
    "end": "end of the processes",
}
"""What a group was at when it failed, by the phase of its heartbeat."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the canary's table; a failed one carries the exit code of its cause."""

    name: str
    state: str
    """ok, warn or fail."""
    found: str
    seconds: float
    exit_code: int = EXIT_DONE

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Failed(Exception):
    """Ends the canary at a check."""

    def __init__(self, name: str, found: str, exit_code: int):
        super().__init__(found)
        self.name, self.found, self.exit_code = name, found, exit_code


def canary(bundle: Bundle) -> list[Check]:
    """All checks, or those up to the first that failed."""
    return list(examine(bundle))


def exit_code(checks: list[Check]) -> int:
    """Of the failed check, if any."""
    return next((check.exit_code for check in checks if check.state == "fail"), EXIT_DONE)


def examine(bundle: Bundle) -> Iterator[Check]:
    """Each check as soon as it has passed; the first failed one ends them. The scratch folder stays only then."""
    scratch = Path(bundle.config.runs_dir) / f".canary-{bundle.run_id}-{os.getpid()}"
    began = time.monotonic()
    try:
        for name, found in _steps(bundle, scratch):
            state, text = (found.state.value, found.found) if isinstance(found, verdicts.Finding) else ("ok", found)
            now = time.monotonic()
            yield Check(name, state, text, round(now - began, 3))
            began = now
    except _Failed as failed:
        if failed.exit_code in INTERRUPTED:
            shutil.rmtree(scratch, ignore_errors=True)
        kept = f". Kept: {scratch}" if scratch.exists() else ""
        yield Check(failed.name, "fail", failed.found + kept, round(time.monotonic() - began, 3), failed.exit_code)
        return
    shutil.rmtree(scratch)


def _steps(bundle: Bundle, scratch: Path) -> Iterator[tuple[str, str | verdicts.Finding]]:
    config = bundle.config
    sets = _guard("config and data", lambda: check_run(config, num_processes(config.compute)))
    yield "config and data", f"{sets.train.num_samples:,} images of {sets.num_classes} classes"
    _guard("runs_dir", lambda: _make(scratch))
    yield "runs_dir", f"{config.runs_dir} can be written"
    yield "shared memory", _not_worse_than_warn(verdicts.judge_shm(probes.read_shm()))
    yield "shards", _guard("shards", lambda: _read_shards(sets, config))
    yield "W&B", _ask_wandb(config)
    steps = min(STEPS, total_steps(config, sets.plan(config).steps_per_epoch))
    full = with_config(bundle, scratch_config(config, scratch / "full", steps, _smallest(sets.val)))
    _train(full, sets)
    timing = read_timing(full.folder, steps)
    yield from _tell_training(full, sets, timing)
    if steps > 1:
        yield "resume", _resume(bundle, full, scratch / "resumed", steps)
    yield "estimate", estimate_hours(timing, config, sets)


def _guard(name: str, work: Callable[[], Any]) -> Any:
    """Do it; an error that a user can read becomes the failed check `name`."""
    try:
        return work()
    except OrchestratorError as error:
        raise _Failed(name, str(error), error.exit_code) from None


def _make(scratch: Path) -> None:
    with disk_errors(scratch):
        scratch.mkdir(parents=True)
        probes.try_write(scratch)


def _not_worse_than_warn(finding: verdicts.Finding) -> verdicts.Finding:
    """Batches of forked workers lie in anonymous memory, so a small /dev/shm may hurt and need not."""
    return replace(finding, state=verdicts.State.warn) if finding.state is verdicts.State.fail else finding


def _smallest(index: ShardIndex) -> Shard:
    return min((shard for shard in index.shards if shard.nsamples), key=lambda shard: shard.nsamples)


def _read_shards(sets: Sets, config: RunConfig) -> str:
    """Hash the first training shard and the smallest of validation, decode some images of each."""
    shards = [next(shard for shard in sets.train.shards if shard.nsamples), _smallest(sets.val)]
    for shard in shards:
        require_readable(shard, config.data.max_pixels, DECODED)
    names = " and ".join(shard.location.rpartition("/")[2] for shard in shards)
    return f"{names}: sha256 as indexed, images decode"


def _ask_wandb(config: RunConfig) -> str | verdicts.Finding:
    if config.tracking.mode is not TrackingMode.online:
        return f"{config.tracking.mode.name}, no server is needed"
    from orchestrator.doctor import wandb_url

    outcome: int | str
    try:
        outcome = probes.in_background(probes.ask_server, wandb_url(), SERVER_TIMEOUT_S).result(SERVER_TIMEOUT_S)
    except (OSError, ValueError, TimeoutError) as error:
        outcome = str(error) or f"no answer in {SERVER_TIMEOUT_S:g} s"
    return verdicts.judge_wandb_server(wandb_url(), outcome)


def scratch_config(config: RunConfig, runs_dir: Path, steps: int, val: Shard) -> RunConfig:
    """The same run, ended after `steps`, saved before the last one, evaluated on one shard, told to nobody."""
    when, cluster = config.checkpointing, config.cluster
    return replace(
        config,
        runs_dir=str(runs_dir),
        max_steps=steps,
        data=replace(config.data, val=val.location),
        checkpointing=replace(
            when, every_epochs=0, every_steps=max(1, steps - 1), every_s=0.0, keep_last=STEPS, keep_best=0, mirror=None
        ),
        tracking=replace(config.tracking, mode=TrackingMode.disabled, log_every_steps=1),
        compute=replace(config.compute, check_ranks_every_steps=1, max_time_s=0.0),
        cluster=replace(cluster, max_restarts=0),
    )


def _train(bundle: Bundle, sets: Sets, prefix: str = "") -> None:
    """Run a group of ranks to its end, or name what they were at when it failed."""
    bundle.folder.mkdir(parents=True, exist_ok=True)
    write_bundle(bundle, bundle.folder / "run.json", sets.facts())
    ended = run_attempts(bundle, _rank, (str(bundle.folder / "run.json"),))
    if ended.exit_code:
        raise _Failed(prefix + _failed_part(bundle.folder, ended), _cause(ended), ended.exit_code)


def _rank(bundle_path: str, attempt: int, began: float) -> None:
    """What each process runs: a rank of training without a word on the terminal."""
    from orchestrator.train.fit import fit
    from orchestrator.train.process import supervise

    bundle, world = load_bundle(Path(bundle_path)), read_world()
    with open(os.devnull, "w") as nowhere:
        code = supervise(bundle.folder, world, attempt, lambda out: fit(bundle, world, attempt, began, nowhere))
    if code:
        sys.exit(code)


def _failed_part(folder: Path, ended: Ended) -> str:
    sign = read_sign(heartbeat_file(folder, 1, ended.rank or 0))
    return PARTS[sign.phase if sign else "start"]


def _cause(ended: Ended) -> str:
    where = f"rank {ended.rank}: " if ended.rank is not None else ""
    last_calls = "\n" + ended.traceback.rstrip() if ended.traceback else ""
    return f"{where}{ended.error or f'ended with code {ended.exit_code}'}{last_calls}"


def _tell_training(bundle: Bundle, sets: Sets, timing: Timing) -> Iterator[tuple[str, str]]:
    config, processes = bundle.config, timing.world_size
    yield (
        "train steps",
        (
            f"{timing.steps} steps on {processes} {'processes' if processes > 1 else 'process'}, {timing.step_s:.3g} s "
            f"each, started in {timing.start_s:.1f} s"
        ),
    )
    yield "loader", f"{config.data.num_workers} workers a process, {timing.data_wait:.0%} of a step waits for data"
    if processes > 1 and config.compute.check_ranks_every_steps:
        yield "equal ranks", f"the weights of {processes} ranks have the same bits after each step"
    yield "memory", _tell_memory(timing)
    yield "validation", f"{timing.val_samples} images in {timing.eval_s:.1f} s"
    yield "checkpoint", _guard("checkpoint", lambda: _verify_last(bundle.folder))


def _tell_memory(timing: Timing) -> str:
    gpu = f"peak {timing.gpu_gib:.2f} GiB of the GPU, " if timing.gpu_gib else ""
    return f"{gpu}{timing.cpu_gib:.2f} GiB a process"


def _verify_last(folder: Path) -> str:
    last = Path(read_json(folder / "result.json")["last"])
    files = checkpoint.open_checkpoint(last).manifest["files"].values()
    return f"{sum(file['bytes'] for file in files) / 2**20:.1f} MiB written and verified"


def other_world(virtual_ranks: int | None, world_size: int, places: int) -> int:
    """Another number of processes that computes the same bits: half, else double, else the same again."""
    candidates = [world_size // 2, world_size * 2] if virtual_ranks else []
    fitting = [size for size in candidates if 1 <= size <= places and serves(virtual_ranks, size)]
    return fitting[0] if fitting else world_size


def _resume(bundle: Bundle, full: Bundle, runs_dir: Path, steps: int) -> str:
    """Repeat the last step in a fresh group from the checkpoint before it, and compare the bits."""
    saved = full.folder / "checkpoints" / checkpoint.step_folder(steps - 1)
    manifest = checkpoint.open_checkpoint(saved).manifest
    world_size = other_world(manifest.get("virtual_ranks"), manifest["world_size"], _places(bundle.config))
    config = replace(
        full.config,
        runs_dir=str(runs_dir),
        compute=replace(full.config.compute, num_processes=str(world_size)),
    )
    again = with_config(full, config)
    root = again.folder / "checkpoints"
    shutil.copytree(saved, root / saved.name)
    write_json(root / checkpoint.LATEST, {"schema": checkpoint.SCHEMA, "step": steps - 1, "folder": saved.name})
    _train(again, check_run(config, world_size), "resume: ")
    first, second = (read_json(one.folder / "result.json")["state_sha256"] for one in (full, again))
    what = f"step {steps} again by {world_size} of {manifest['world_size']} processes"
    if first == second:
        return f"{what}: the same bits"
    if not config.compute.deterministic:
        return f"{what}: other bits, as compute.deterministic=false allows"
    raise _Failed("resume", f"{what} has other bits: {_differing(full, again, steps)}", EXIT_USER)


def _places(config: RunConfig) -> int:
    return visible_gpus(config.compute) or 2 * num_processes(config.compute)


def _differing(full: Bundle, again: Bundle, steps: int) -> str:
    """The first tensor that differs, and the way out."""
    states = (
        checkpoint.read_checkpoint(one.folder / "checkpoints" / checkpoint.step_folder(steps)).load_state().model
        for one in (full, again)
    )
    a, b = states
    name = next((name for name in a if not a[name].equal(b[name])), "only the optimizer's state or the average")
    return (
        f"{name} differs first. Way out: a model without state outside its parameters and buffers, and without random "
        "numbers that are not torch's; or compute.deterministic=false, which promises no bits"
    )
