"""What a person sees of a run: a live line on a terminal, one plain line an event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import IO, Any


class Progress:
    """Silent; the ranks after the first use it as it is."""

    def start(self, total_steps: int, step: int) -> None: ...

    def tick(self, step: int) -> None: ...

    def update(self, step: int, facts: Mapping[str, Any]) -> None: ...

    def say(self, line: str) -> None: ...

    def stop(self) -> None: ...


class PlainProgress(Progress):
    """One line for each logged step and event."""

    def __init__(self, out: IO[str]):
        self._out, self._began, self._first, self._total = out, time.monotonic(), 0, 0

    def start(self, total_steps: int, step: int) -> None:
        self._began, self._first, self._total = time.monotonic(), step, total_steps

    def update(self, step: int, facts: Mapping[str, Any]) -> None:
        self.say(f"step {step}/{self._total}  {_facts(facts)}  ETA {_clock(self._eta_s(step))}")

    def _eta_s(self, step: int) -> float:
        done = step - self._first
        return (time.monotonic() - self._began) / done * (self._total - step) if done else 0.0

    def say(self, line: str) -> None:
        print(line, file=self._out, flush=True)


class LiveProgress(Progress):
    """A bar with epoch, step, loss, top-1, images/s and the time left."""

    def __init__(self, out: IO[str]):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("[bold]training"),
            BarColumn(bar_width=24),
            TextColumn("step"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(file=out, force_terminal=True),
            transient=True,
            redirect_stdout=False,  # they go to the rank's log
            redirect_stderr=False,
        )
        self._task: Any = None

    def start(self, total_steps: int, step: int) -> None:
        self._bar.start()
        self._task = self._bar.add_task("", total=total_steps, completed=step, facts="")

    def tick(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def update(self, step: int, facts: Mapping[str, Any]) -> None:
        self._bar.update(self._task, completed=step, facts=_facts(facts))

    def say(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._bar.stop()


def open_progress(out: IO[str]) -> Progress:
    return LiveProgress(out) if out.isatty() else PlainProgress(out)


def _facts(facts: Mapping[str, Any]) -> str:
    return (
        f"epoch {facts['epoch']:.2f}  loss {facts['train/loss']:.4f}  top-1 {facts['train/acc1']:.1%}  "
        f"{facts['train/images_per_s']:,.0f} images/s"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
