"""What every launcher reads of a run's folder before it starts ranks, and writes into it after they have ended."""

from __future__ import annotations

from pathlib import Path

from orchestrator.bundle import Bundle
from orchestrator.cluster.cause import Ended
from orchestrator.files import read_json, write_json


def is_finished(folder: Path) -> bool:
    """Whether the run has come to its end."""
    path = folder / "result.json"
    return path.exists() and read_json(path)["state"] == "done"


def warning_of_other_code(bundle: Bundle) -> str | None:
    """What to say where earlier attempts ran other code."""
    path = bundle.folder / "run.json"
    earlier = read_json(path)["code_digest"] if path.exists() else bundle.code_digest
    if earlier == bundle.code_digest:
        return None
    return f"warning: this run was started by other code ({earlier[:12]}, now {bundle.code_digest[:12]})"


def conclude(bundle: Bundle, ended: Ended) -> str | None:
    """What only the launcher can write: a result where the ranks left none, and the report of whatever came out.

    Returns a warning where there is no report.
    """
    # Here and not above: seconds of imports, which no start of a run shall wait for.
    from orchestrator.track.report import write_report
    from orchestrator.train.outcome import record_failure, record_stop

    if ended.error:
        record_failure(bundle, ended.exit_code, ended.rank, ended.error)
    elif ended.exit_code:
        record_stop(bundle, ended.exit_code)
    _record_time(bundle.folder)
    try:
        write_report(bundle.folder)
    except Exception as error:  # the exit code is a contract about the run, which a page must not break
        return f"warning: no report.html ({type(error).__name__}: {error})"
    return None


def _record_time(folder: Path) -> None:
    """The seconds of all ranks and of what lay between the attempts, which no rank can know."""
    from orchestrator.track.goodput import measure_run
    from orchestrator.track.runs import load_run

    came, path = measure_run(load_run(folder)), folder / "result.json"
    if came.seconds and path.exists():
        seconds = {phase: round(spent, 3) for phase, spent in came.seconds.items()}
        write_json(path, {**read_json(path), "seconds": seconds})
