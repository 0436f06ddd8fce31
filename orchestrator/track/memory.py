"""The memory of a step as a picture: one colour for each phase, the peak marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

COLOURS = {"forward": "#4878a8", "backward": "#d1813a", "optimizer": "#5a9a68"}
KEPT = "#8a8f98"
"""Of weights and optimizer state, which are there before and after the step."""
MIB = 2**20


class Held(Protocol):
    """Bytes that are held after an operation of a phase."""

    @property
    def phase(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


def draw_memory(timeline: Sequence[Held], path: Path) -> None:
    """Write the picture in the format of the file's name; the first moment is what is kept between steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    held = [moment.nbytes / MIB for moment in timeline]
    for phase, colour in COLOURS.items():
        within = [moment.phase == phase for moment in timeline]
        axes.fill_between(range(len(held)), held, where=within, step="post", color=colour, label=phase, linewidth=0)
    axes.fill_between(range(len(held)), min(held), color=KEPT, label="kept between steps", linewidth=0)
    peak = max(range(len(held)), key=held.__getitem__)
    axes.annotate(f"{held[peak]:,.0f} MiB", (peak, held[peak]), xytext=(0, 4), textcoords="offset points", ha="center")
    axes.set(xlabel="operations of a step", ylabel="MiB", ylim=(0, 1.12 * held[peak]), xlim=(0, len(held)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(COLOURS) + 1, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    figure.savefig(path, dpi=150)
