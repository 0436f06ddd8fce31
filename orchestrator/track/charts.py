"""The curves of a run as SVG that takes its colours from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.track.runs import Event, resumed_step, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_IN = (4.6, 2.35)
MARKERS_UP_TO = 24
"""Points of a curve that are few enough to be marked; one point alone would be invisible otherwise."""

PALETTE = {
    "#000001": "var(--ink-2)",
    "#000002": "var(--rule)",
    "#000003": "var(--c1)",
    "#000004": "var(--c2)",
    "#000005": "var(--c3)",
    "#000006": "var(--mark)",
}
"""Stand-in colours of the drawing -> colours of the page."""
INK, RULE, FIRST, SECOND, THIRD, MARK = PALETTE

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}

Label = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: which events and which of their metrics, and how the page names it."""

    kind: str
    key: str
    name: str
    colour: str = FIRST
    thin: bool = False
    label: Label = "{:.3g}".format


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes."""

    curves: tuple[Curve, ...]
    share: bool = False
    """The values are shares: the axis counts in per cent."""
    from_zero: bool = False
    ticks: int = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """What a chart shows."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart and its legend: (colour, name, latest value)."""

    title: str
    svg: str
    legend: list[tuple[str, str, str]] = field(default_factory=list)


def per_cent(value: float) -> str:
    return f"{value:.2%}".replace("%", " %")


PLANS = (
    Plan("Loss", (Panel((Curve("step", "train/loss", "train", FIRST, thin=True),
                         Curve("eval", "val/loss", "validation", SECOND))),)),
    Plan("Accuracy", (Panel((Curve("step", "train/acc1", "train top-1", FIRST, thin=True, label=per_cent),
                             Curve("eval", "val/acc1", "val top-1", SECOND, label=per_cent),
                             Curve("eval", "val/acc5", "val top-5", THIRD, label=per_cent)), share=True),)),
    Plan("Learning rate", (Panel((Curve("step", "lr", "per step"),), from_zero=True),)),
    Plan("Throughput", (Panel((Curve("step", "train/images_per_s", "images/s"),), from_zero=True, ticks=3),
                        Panel((Curve("step", "data_wait_fraction", "waiting for data", SECOND, label=per_cent),),
                              share=True, from_zero=True, ticks=2))),
)  # fmt: skip


def draw_charts(events: Sequence[Event], all_events: Iterable[Event]) -> list[Chart]:
    """The charts that have a point to show; `events` hold each step once, `all_events` tell the attempts."""
    present = [plan for plan in PLANS if any(_points(events, c)[0] for p in plan.panels for c in p.curves)]
    if not present:
        return []
    marks = attempt_marks(events, all_events)
    return [_draw(plan, events, marks) for plan in present]


def attempt_marks(events: Sequence[Event], all_events: Iterable[Event]) -> list[tuple[float, int]]:
    """(epoch, attempt) at which each attempt after the first went on."""
    per_epoch = next((e["step"] / e["epoch"] for e in events if e.get("step") and e.get("epoch")), None)
    marks: dict[int, float] = {}
    for event in all_events:
        attempt = event.get("attempt")
        if per_epoch and isinstance(attempt, int) and attempt > 1 and attempt not in marks and "step" in event:
            marks[attempt] = resumed_step(event) / per_epoch
    return [(epoch, attempt) for attempt, epoch in marks.items()]


def _points(events: Sequence[Event], curve: Curve) -> tuple[list[float], list[float]]:
    return series(events, curve.kind, curve.key)


def _draw(plan: Plan, events: Sequence[Event], marks: list[tuple[float, int]]) -> Chart:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {**STYLE, "svg.hashsalt": plan.title}
    with mpl.rc_context(style):
        heights = [3, 2][: len(plan.panels)]
        figure = Figure(figsize=SIZE_IN, layout="constrained")
        grid = figure.subplots(len(plan.panels), 1, sharex=True, squeeze=False, height_ratios=heights)
        for axes, panel in zip(grid[:, 0], plan.panels, strict=True):
            _draw_panel(axes, panel, events, marks)
        grid[-1, 0].set_xlabel("epoch")
        svg = _to_svg(figure, plan.title)
    curves = [curve for panel in plan.panels for curve in panel.curves]
    found = [(c, values[-1]) for c in curves if (values := _points(events, c)[1])]
    return Chart(plan.title, svg, [(PALETTE[c.colour], c.name, c.label(last)) for c, last in found])


def _draw_panel(axes: Axes, panel: Panel, events: Sequence[Event], marks: list[tuple[float, int]]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for curve in panel.curves:
        epochs, values = _points(events, curve)
        values = [y if math.isfinite(y) else math.nan for y in values]
        marker = "o" if len(values) <= MARKERS_UP_TO else None
        width = 1.0 if curve.thin else 1.8
        axes.plot(epochs, values, color=curve.colour, linewidth=width, marker=marker, markersize=2 + width / 2)
    for epoch, _ in marks:
        axes.axvline(epoch, color=MARK, linewidth=1, linestyle=(0, (3, 2)))
    axes.margins(x=0.02, y=0.08)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=panel.ticks, steps=[1, 2, 5, 10]))
    if panel.share:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))
    if panel.from_zero:
        axes.set_ylim(bottom=0)


def _to_svg(figure: Figure, title: str) -> str:
    """The drawing without size, fonts and colours of its own, its ids unique on the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    prefix = re.sub(r"\W", "", title).lower()
    body = drawing[drawing.index(">", drawing.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|font-family: [^;\"]*;? ?", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", body)
    for stand_in, colour in PALETTE.items():
        body = body.replace(stand_in, colour)
    width, height = (round(72 * side, 1) for side in SIZE_IN)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{title}" viewBox="0 0 {width} {height}">{body}'
    )
