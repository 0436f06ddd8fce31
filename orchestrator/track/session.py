"""Starts a W&B run, live or offline, within a bound.

Facts about wandb 0.31 that shape this module: `wandb.init` blocks until the server answers; its service process refuses
a run id that a failed `init` still holds, so the service is ended before the offline start; a run that cannot upload
keeps `finish` waiting unless `finish_timeout` is set; and its own telemetry calls the server even from offline runs and
holds up the exit of the process, and its import hooks raise inside other people's imports when the service has died:
both are turned off.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import TrackingConfig
from orchestrator.redact import without_secrets
from orchestrator.secrets import read_secret

if TYPE_CHECKING:
    from wandb import Run, Settings

logger = logging.getLogger(__name__)

UPLOAD_TIMEOUT_S = 15.0
"""How long wandb's service goes on uploading after the end of a run."""


@dataclass(frozen=True, slots=True)
class Plan:
    config: TrackingConfig
    run_folder: Path
    run_id: str
    name: str
    run_config: Mapping[str, Any]
    on_url: Callable[[str], None] | None


def open_online(plan: Plan, finishing: threading.Event) -> Run | None:
    """The live run, or None after one warning: no credentials, no answer in time, or training is over before it."""
    import wandb

    opened: list[Run] = []
    reasons: list[str] = []

    def attempt() -> None:
        try:
            _begin_session(plan)
            if wandb.login(prompt=False, verify=False):
                opened.append(init_run(plan, "online"))
            else:
                reasons.append("no API key (tracking.secret=FILE, `wandb login` or WANDB_API_KEY gives one)")
        except (Exception, SystemExit) as error:
            reasons.append(first_line(error))

    before = set(_folders(plan))
    thread = threading.Thread(target=attempt, name="wandb-init", daemon=True)
    thread.start()
    _wait_for(thread, plan.config.init_timeout_s, finishing)
    if opened:
        return opened[0]
    logger.warning("W&B is not reachable (%s): this run goes on offline", (reasons or ["no answer in time"])[0])
    end_service(patience_s=2.0)
    thread.join(2.0)
    for folder in set(_folders(plan)) - before:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _wait_for(thread: threading.Thread, timeout_s: float, finishing: threading.Event) -> None:
    """Wait for the live start; a run that ends meanwhile grants it two seconds more."""
    end = time.monotonic() + timeout_s + 1.0
    while thread.is_alive() and time.monotonic() < end:
        thread.join(0.1)
        if finishing.is_set():
            end = min(end, time.monotonic() + 2.0)
            finishing = threading.Event()


def end_service(patience_s: float = UPLOAD_TIMEOUT_S) -> None:
    """End wandb's service process, by force when it does not end in time.

    While it lives, it refuses the run id of a start that failed, and holds the output streams of this process open.
    """
    import wandb
    from wandb.sdk import wandb_setup

    connection = getattr(wandb_setup._singleton, "_connection", None)
    process = getattr(getattr(connection, "_proc", None), "_process", None)
    thread = threading.Thread(target=_silently, args=(wandb.teardown,), name="wandb-teardown", daemon=True)
    thread.start()
    thread.join(patience_s)
    if thread.is_alive() and process is not None:
        process.kill()
        thread.join(patience_s)


def _silently(action: Callable[[], object]) -> None:
    try:
        action()
    except (Exception, SystemExit) as error:
        logger.debug("wandb.teardown: %s", error)


def turn_telemetry_off() -> None:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    from wandb.analytics.opentelemetry import opentelemetry_proxy

    opentelemetry_proxy.disable()


def _folders(plan: Plan) -> list[Path]:
    return list((plan.run_folder / "wandb").glob("run-*"))


def init_run(plan: Plan, mode: str) -> Run:
    import wandb
    from wandb.sdk.lib import import_hooks

    plan.run_folder.joinpath("wandb").mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        mode="online" if mode == "online" else "offline",
        project=plan.config.project,
        entity=plan.config.entity,
        group=plan.config.group,
        tags=list(plan.config.tags),
        name=plan.name,
        id=plan.run_id,
        resume="allow",
        reinit="create_new",
        dir=str(plan.run_folder),
        config=without_secrets(dict(plan.run_config)),
        settings=_settings(plan),
    )
    import_hooks.unregister_all_post_import_hooks()
    run.define_metric("global_step")
    run.define_metric("*", step_metric="global_step")
    return run


def _settings(plan: Plan) -> Settings:
    """Quiet, bounded, and nothing about this machine, its command line, packages or code."""
    import wandb

    return wandb.Settings(
        init_timeout=plan.config.init_timeout_s,
        finish_timeout=UPLOAD_TIMEOUT_S,
        finish_timeout_raises=True,
        silent=True,
        quiet=True,
        console="off",
        symlink=False,
        host="",
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        label_disable=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_disable_viewer=True,
        x_save_requirements=False,
    )


def _begin_session(plan: Plan) -> None:
    """With the API key where `tracking.secret` says where it is: in no variable, which children would inherit, and in
    no netrc file, into which `wandb.login(key=...)` would write it."""
    import wandb

    server = wandb.setup(_settings(plan)).settings.base_url
    if plan.config.secret is not None:
        wandb.setup(wandb.Settings(base_url=server, api_key=read_secret("tracking", plan.config.secret)))


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
