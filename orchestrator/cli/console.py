"""What every verb prints with: tables, JSON, and progress as a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from orchestrator.redact import redact

PLAIN_EVERY_S = 5.0
WIDE = 1000
"""Columns where the output is no terminal: who reads a pipe wants ids whole."""

Advance = Callable[[int], None]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def note(message: str) -> None:
    """One line to the person at the terminal, without secrets; stdout stays free for facts."""
    print(redact(message), file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Show how far a long piece of work is; yields ``advance(n)``."""
    with _bar(description, total, unit) if sys.stderr.isatty() else _lines(description, total, unit) as advance:
        yield advance


@contextmanager
def _bar(description: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


@contextmanager
def _lines(description: str, total: int, unit: str) -> Iterator[Advance]:
    done, last = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S and done < total:
            note(f"{description}: {done}/{total} {unit}")
            last = now

    yield advance
    note(f"{description}: {done}/{total} {unit}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on stdout; numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    is_terminal = sys.stdout.isatty()
    Console(soft_wrap=not is_terminal, width=None if is_terminal else WIDE).print(table)


def given_options(args: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """The options of a dataclass that the command line sets; what it leaves out keeps the dataclass's default."""
    values = {field.name: getattr(args, field.name, None) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}
