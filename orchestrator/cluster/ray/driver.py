"""The job inside the cluster: Ray Train starts a worker for each rank, this process speaks for the run.

It prints what every rank logs, asks the ranks to save when the job is stopped, and ends with the contract's code.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.bundle import Bundle, load_bundle
from orchestrator.cluster.cause import Ended, first_cause, left_errors
from orchestrator.cluster.environment import ASK_FILE
from orchestrator.cluster.job import num_processes
from orchestrator.cluster.journal import Journal
from orchestrator.cluster.local import next_attempt
from orchestrator.cluster.lock import only_writer
from orchestrator.cluster.ray import kuberay
from orchestrator.cluster.ray.ask import PodAsked
from orchestrator.cluster.ray.errand import now_file
from orchestrator.cluster.ray.meeting import SUBMISSION_VARIABLE, restart_file, stopping_file, write_driver
from orchestrator.cluster.ray.scaling import scaling_of, told_wants
from orchestrator.cluster.ray.verdict import Judge, RunEnded
from orchestrator.cluster.ray.voice import Voice
from orchestrator.cluster.ray.worker import OwnGroupConfig, RankEnded, run_rank
from orchestrator.cluster.record import conclude, is_finished, warning_of_other_code
from orchestrator.cluster.speaker import Speaker
from orchestrator.cluster.stops import StopSignals
from orchestrator.errors import (
    EXIT_DONE,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    EXIT_TERMINATED,
    EXIT_TRANSIENT,
    EXIT_USER,
    OrchestratorError,
)

NEVER = (EXIT_USER, EXIT_NO_PROGRESS, EXIT_STOPPED)
"""Ends after which no new cluster would change anything."""
NAP_S = 0.2
NOTICE_S = 10.0
"""How long nothing may start before the log says what is waited for."""
RAY_SETTINGS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
"""The controller looks at its workers every half second instead of every two; workers stay where the code is."""


class Retries(ray.train.UserCallback):
    """Runs in the controller: what it raises ends the run, else Ray starts it again."""

    def __init__(self, judge: Judge):
        self._judge = judge

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        if not any(_is_preempted(error) for error in worker_exceptions.values()):
            self._judge.judge(*ends_of(worker_exceptions))


def ends_of(errors: Mapping[int, Exception]) -> tuple[int | None, dict[int, Ended], dict[int, str]]:
    """The attempt, how ranks ended, and of whose worker there is only what Ray says."""
    told, gone, number = dict[int, Ended](), dict[int, str](), None
    for rank, error in errors.items():
        if isinstance(error, RankEnded):
            told[rank], number = error.ended, error.attempt or number
        elif hasattr(error, "health_check_failure") or isinstance(error, ray.exceptions.RayError):
            gone[rank] = _said(error)
        else:
            trace = "".join(traceback.format_exception(error))
            what = f"its worker failed: {type(error).__name__}: {_said(error)}"
            told[rank] = Ended(1, rank, what, trace, by_itself=True)
    return number, told, gone


def _said(error: Exception) -> str:
    """The first line of what Ray makes of a worker's end."""
    actor = getattr(error, "health_check_failure", error)
    return str(actor).strip().splitlines()[0][:300] if str(actor).strip() else type(actor).__name__


def _is_preempted(error: Exception) -> bool:
    """Whether the worker's node was taken away on notice: Ray counts those itself, without a limit."""
    return bool(getattr(getattr(error, "health_check_failure", error), "preempted", False))


@dataclass(slots=True)
class Training:
    """Ray Train at work in a thread, which signals do not reach."""

    bundle: Bundle
    run: str
    command: Sequence[str]
    token: str
    ended: Ended | None = None
    judged: bool = False
    """Whether it ended by our table and not by an accident of Ray's."""
    thread: threading.Thread = field(init=False)

    def start(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True, name="ray train")
        self.thread.start()

    def _run(self) -> None:
        try:
            code = trainer_of(self.bundle, self.run, self.command, self.token).fit().return_value
            self.ended = Ended(EXIT_DONE if code is None else code)
        except Exception as error:
            cause = getattr(error, "controller_failure", error)
            self.judged = isinstance(cause, RunEnded)
            self.ended = _ended_by(cause, str(error))


def _ended_by(cause: Exception, trace: str) -> Ended:
    return cause.ended if isinstance(cause, RunEnded) else Ended(1, None, f"Ray Train: {_said(cause)}", trace)


def trainer_of(bundle: Bundle, run: str, command: Sequence[str], token: str) -> DataParallelTrainer:
    """TorchTrainer's base class: TorchTrainer imports torch in every one of Ray's processes and forms a group there."""
    config, name = bundle.config, _submission_id() or token
    counted_by_us = ray.train.FailureConfig(max_failures=-1, max_preemption_failures=-1)
    return DataParallelTrainer(
        run_rank,
        train_loop_config={"run": run, "command": list(command), "token": token},
        backend_config=OwnGroupConfig(),
        scaling_config=scaling_of(config, ray.cluster_resources()),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(bundle.folder.absolute() / "ray"),
            failure_config=counted_by_us,
            callbacks=[Retries(Judge(bundle.folder, config.cluster))],
        ),
    )


def drive(run: str, command: Sequence[str]) -> int:
    """Run the job to its end. `run`: run.json, as every node finds it; `command`: what starts a rank."""
    began = time.time()
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    bundle = load_bundle(Path(run).absolute())
    context = ray.init(log_to_driver=False, logging_level=logging.WARNING)
    voice = Voice(Speaker(sys.stdout.buffer, 0), bundle.folder, num_processes(bundle.config))
    job = Drive(bundle, StopSignals(), voice, began)
    try:
        with job.stop.listening(), only_writer(bundle.folder):
            ended = _finished(job) if is_finished(bundle.folder) else _train(job, run, command)
    except OrchestratorError as error:
        ended = Ended(error.exit_code, None, str(error))
    code = voice.end(bundle, ended)
    if kuberay.starts_again() and (job.judged or code in NEVER):
        try:
            kuberay.stop_own_job(str(context.dashboard_url))
        except OrchestratorError as error:
            voice.speaker.say(f"warning: KubeRay will start this run again in vain: {error}")
    return code


@dataclass(slots=True)
class Drive:
    """A job under way."""

    bundle: Bundle
    stop: StopSignals
    voice: Voice
    began: float
    asked: float = 0.0
    """time.monotonic() at which the ranks were asked to save."""
    noticed: bool = False
    judged: bool = False
    """Whether our table of exit codes ended it."""

    @property
    def stop_file(self) -> Path:
        return self.bundle.folder / "stop"

    @property
    def is_leaving(self) -> bool:
        """Whether the pod of the driver is told to go (`leave`): the run has to go on elsewhere."""
        return self.stop.received is signal.SIGHUP


def _finished(drive: Drive) -> Ended:
    run_id = drive.bundle.run_id
    drive.voice.speaker.say(f"run {run_id} is already finished; another seed or name starts a new one")
    return Ended(EXIT_DONE)


def _train(drive: Drive, run: str, command: Sequence[str]) -> Ended:
    bundle, token = drive.bundle, secrets.token_hex(8)
    if warning := warning_of_other_code(bundle):
        drive.voice.speaker.say(warning)
    _forget_orders(drive)
    write_driver(bundle.folder, _submission_id(), token)
    training = Training(bundle, run, command, token)
    training.start()
    ended = _follow(drive, training)
    drive.judged = training.judged
    _forget_orders(drive)
    if ended.exit_code == EXIT_STOPPED:
        ended = _unless_not_saved(bundle.folder, ended)
    if ended.exit_code == EXIT_STOPPED and drive.is_leaving:
        ended, drive.judged = replace(ended, exit_code=EXIT_TERMINATED), False
    Journal(bundle.folder).write("end", next_attempt(bundle.folder) - 1, exit_code=ended.exit_code)
    if warning := conclude(bundle, ended):
        drive.voice.speaker.say(warning)
    return ended


def _forget_orders(drive: Drive) -> None:
    """What was ordered of an earlier job. A stop file with a number is the user's, for the run's next steps."""
    folder = drive.bundle.folder
    for left in (restart_file(folder), now_file(folder), stopping_file(folder)):
        left.unlink(missing_ok=True)
    if drive.stop_file.exists() and not drive.stop_file.read_text().strip():
        drive.stop_file.unlink()


def _follow(drive: Drive, training: Training) -> Ended:
    asked = PodAsked(Path(ASK_FILE), drive.voice.speaker)
    while training.thread.is_alive():
        training.thread.join(NAP_S)
        started = drive.voice.look()
        asked.look(drive.bundle.folder, drive.voice.attempt)
        ended = _obey(drive, started) or (None if started else _wait(drive))
        if ended:
            return ended
    assert training.ended is not None
    return training.ended


def _obey(drive: Drive, started: bool) -> Ended | None:
    """Let the ranks save where the job is stopped or its time is over."""
    cluster, now = drive.bundle.config.cluster, time.monotonic()
    late = cluster.deadline_s and time.time() - drive.began > cluster.deadline_s
    abandon = now_file(drive.bundle.folder).exists()
    if drive.stop.exit_code is None and not late and not abandon:
        return None
    if not started or abandon:
        return Ended(EXIT_STOPPED)
    if not drive.asked:
        drive.asked = now
        stopping_file(drive.bundle.folder).touch()
        drive.stop_file.touch()
        drive.voice.speaker.say(f"asked to stop; saves first, for {cluster.grace_s:g} s at most (cluster.grace_s)")
    if now - drive.asked > cluster.grace_s:
        drive.voice.speaker.say(f"cluster.grace_s = {cluster.grace_s:g}: not saved by then; the last checkpoint stays")
        return Ended(EXIT_STOPPED)
    return None


def _wait(drive: Drive) -> Ended | None:
    """Tell what is waited for, and end where that takes too long."""
    waited, limit = time.time() - drive.began, drive.bundle.config.cluster.start_deadline_s
    if waited > NOTICE_S and not drive.noticed:
        drive.noticed = True
        drive.voice.speaker.say(f"waits for its workers: {told_wants(drive.bundle.config)}")
    if limit and waited > limit:
        rule = f"no process has started within {limit:g} s"
        text = f"cluster.start_deadline_s = {limit:g}: {rule}; it asked for {told_wants(drive.bundle.config)}"
        return Ended(EXIT_TRANSIENT, None, f"{text}. Way out: a cluster with so much, or less of it")
    return None


def _unless_not_saved(folder: Path, ended: Ended) -> Ended:
    """A stop whose last save failed for a known reason did not stop after saving."""
    errors = left_errors(folder, next_attempt(folder) - 1)
    known = [error for error in errors if error["traceback"] is None]
    return first_cause({}, known) if known else ended


def _submission_id() -> str | None:
    """Of the job that this process is, None where nobody sent it through the Jobs API."""
    return os.environ.get(SUBMISSION_VARIABLE)
