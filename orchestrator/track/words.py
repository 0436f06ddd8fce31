"""Numbers and outcomes as a reader says them."""

from __future__ import annotations

from datetime import UTC, datetime

EXIT_MEANING = {
    0: "done",
    42: "a mistake in the config, the data or a checkpoint; a retry without a change fails again",
    43: "no progress in three attempts running; the cause is in the error below",
    44: "the machine was unfit: a device lost or the disk full",
    45: "stopped on request after saving",
    75: "something outside failed that may work at the next attempt",
    130: "stopped by Ctrl-C after saving",
    143: "stopped by SIGTERM after saving",
}


def exit_meaning(code: int | None) -> str:
    return "" if code is None else EXIT_MEANING.get(code, "a crash")


def first_line(error: object) -> str:
    """What an error says in one line."""
    return (str(error or "").splitlines() or ["unknown"])[0]


def duration(seconds: float | None) -> str:
    """``2 h 5 min``, ``1 min 9 s``, ``4.2 s``."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def moment(unix_s: float | None) -> str:
    return "–" if unix_s is None else datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def size(nbytes: float) -> str:
    """Three digits, in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} TiB"


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %"


def plain(value: object) -> str:
    """A config value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(plain(item) for item in value)}]"
    return str(value)
