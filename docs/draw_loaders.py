"""Write the charts and tables of docs/loaders.md from bench/out/loaders.json: no figure there is typed by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.bench.loaders.behind import sentences  # noqa: E402
from tests.bench.loaders.catalogue import LIMIT, LOADERS  # noqa: E402

RESULTS = ROOT / "bench" / "out" / "loaders.json"
PAGE = ROOT / "docs" / "loaders.md"
BEGIN, END = "<!-- figures: python docs/draw_loaders.py -->", "<!-- end of figures -->"
INK, OURS, THEIRS, MARK = "#7a7f87", "#2a78d6", "#a7adb5", "#d9622b"
"""Readable on white and on dark pages: the drawings have no background of their own."""


def rows_of(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(loader, figures) in the order of speed."""
    rows = [(name, one) for name, one in result["loaders"].items() if "1" in one and name in LOADERS]
    return sorted(rows, key=lambda row: -row[1]["1"]["images_per_cpu_s"])


def speed_table(result: dict[str, Any]) -> str:
    lines = [
        "| loader | images/s per core | range | × ours | images/s, 1 worker | 2 workers | reads | note |",
        "|---|--:|--:|--:|--:|--:|---|---|",
    ]
    for name, one in rows_of(result):
        first, loader = one["1"], LOADERS[name]
        low, high = first["images_per_cpu_s_range"]
        title = f"**{loader.title}**" if loader.is_ours or name == LIMIT else loader.title
        two = f"{one['2']['images_per_s']:,.0f}" if "2" in one else "–"
        lines.append(
            f"| {title} | {first['images_per_cpu_s']:,.0f} | {low:,.0f}–{high:,.0f} | {first['ratio'] or 0:.2f} "
            f"| {first['images_per_s']:,.0f} | {two} | {loader.data} | {loader.note} |"
        )
    return "\n".join(lines)


def memory_table(result: dict[str, Any]) -> str:
    lines = ["| loader | first batch, s | MiB with 1 worker | MiB per worker with 2 |", "|---|--:|--:|--:|"]
    for name, one in rows_of(result):
        two = f"{one['2']['memory_mib_per_worker']:,}" if "2" in one else "–"
        first = one["1"]
        lines.append(
            f"| {LOADERS[name].title} | {first['first_batch_s']:.1f} | {first['memory_mib_per_worker']:,} | {two} |"
        )
    return "\n".join(lines)


def seconds_table(result: dict[str, Any], columns: Sequence[tuple[str, str]]) -> str:
    """A measurement of its own: loader -> seconds or speeds, or why there are none."""
    if "absent" in result:
        return f"Not measured: {result['absent']}."
    head = "".join(f" {title} |" for _, title in columns)
    lines = [f"| loader |{head}", "|---|" + "--:|" * len(columns)]
    for name, one in result.items():
        title = LOADERS[name].title if name in LOADERS else name
        if not isinstance(one, dict) or "absent" in one:
            reason = one["absent"] if isinstance(one, dict) else one
            lines.append(f"| {title} | not measured: {str(reason).splitlines()[0]} |" + " |" * (len(columns) - 1))
            continue
        lines.append(f"| {title} |" + "".join(f" {one[key]:,} |" for key, _ in columns))
    return "\n".join(lines)


OTHERS = {
    "resume": (
        "Resuming in the middle of an epoch, two workers, imports left out:",
        (("fresh_s", "fresh epoch, s to first batch"), ("midway_s", "midway, s")),
    ),
    "remote": (
        "From S3 on the loopback (SeaweedFS), two workers, imports left out:",
        (
            ("cold_images_per_s", "cold cache, images/s"),
            ("cold_first_batch_s", "s to first batch"),
            ("warm_images_per_s", "warm cache, images/s"),
            ("warm_first_batch_s", "s to first batch"),
        ),
    ),
}
"""Measurement besides the speeds -> what is said above its table, and the table's columns."""


def figures(results: dict[str, Any]) -> str:
    """Everything between the marks of the page."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"Measured on {machine['date']}: {machine['processor']}, {machine['cores']} cores, load {machine['load']:.1f} "
        f"at the start; {results['rounds']} rounds of {results['images']:,} images in turns; {versions}."
    ]
    for name in ("photos", "synthetic"):
        if name not in results:
            continue
        result = results[name]
        parts.append(f"### Set `{name}`\n\n![images per second and core](loaders-{name}-speed.svg)")
        parts.append(speed_table(result))
        parts.append(f"![first batch and memory](loaders-{name}-memory.svg)\n\n{memory_table(result)}")
        for module, (title, columns) in OTHERS.items():
            told = seconds_table(result[module], columns) if module in result else "not measured in this series."
            parts += [title, told]
        parts.append(behind(result))
    parts.append(absences(results["absent"]))
    return "\n\n".join(part for part in parts if part)


def behind(result: dict[str, Any]) -> str:
    lines = [f"* {sentence}" for sentence in sentences(result)] or ["* In none of these figures."]
    return "\n".join(["Where it is not ahead:", "", *lines])


def absences(absent: dict[str, Any]) -> str:
    lines = [f"* {name}: {reason}" for what in ("peers", "sets") for name, reason in absent[what].items()]
    for data, loaders in absent["loaders"].items():
        lines += [f"* {LOADERS[name].title} on {data}: {reason}" for name, reason in loaders.items()]
    return "\n".join(["What could not be measured:", "", *lines]) if lines else ""


def draw(name: str, result: dict[str, Any]) -> None:
    import matplotlib as mpl

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "loaders", "font.size": 9, "text.color": INK, "axes.edgecolor": INK,
        "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "font.family": "sans-serif",
    }  # fmt: skip
    with mpl.rc_context(style):
        _draw_speed(ROOT / "docs" / f"loaders-{name}-speed.svg", result)
        _draw_memory(ROOT / "docs" / f"loaders-{name}-memory.svg", result)


def _draw_speed(path: Path, result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    rows = [row for row in rows_of(result) if row[0] != LIMIT][::-1]
    figure = Figure(figsize=(8, 0.32 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    values = [one["1"]["images_per_cpu_s"] for _, one in rows]
    _bars(axes, rows, values)
    limit = result["loaders"].get(LIMIT, {}).get("1")
    if limit:
        axes.axvline(limit["images_per_cpu_s"], color=MARK, linewidth=1.2, linestyle="--")
        told = f"practical limit on JPEGs as they come: {limit['images_per_cpu_s']:,.0f}"
        axes.annotate(
            told,
            (limit["images_per_cpu_s"], 1),
            xycoords=("data", "axes fraction"),
            color=MARK,
            ha="center",
            va="bottom",
        )
    axes.set_xlabel("images/s per core: decode, RandomResizedCrop(224), flip, uint8 batches of 128")
    _save(figure, path)


def _draw_memory(path: Path, result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    rows = rows_of(result)[::-1]
    figure = Figure(figsize=(8, 0.3 * len(rows) + 0.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, rows, [one["1"]["first_batch_s"] for _, one in rows], "{:,.1f}")
    left.set_xlabel("seconds from start to first batch")
    _bars(right, rows, [one["1"]["memory_mib_per_worker"] for _, one in rows])
    right.set_xlabel("MiB of its own memory, 1 worker")
    _save(figure, path)


def _bars(axes: Any, rows: list[tuple[str, Any]], values: list[float], form: str = "{:,.0f}") -> None:
    colours = [MARK if name == LIMIT else OURS if LOADERS[name].is_ours else THEIRS for name, _ in rows]
    bars = axes.barh([LOADERS[name].title for name, _ in rows], values, color=colours, height=0.7)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8, color=INK)
    axes.margins(x=0.12, y=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def main() -> int:
    if not RESULTS.exists():
        print(f"error: {RESULTS} is missing. Way out: python -m tests.bench loaders", file=sys.stderr)
        return 42
    results = json.loads(RESULTS.read_text())
    for name in ("photos", "synthetic"):
        if name in results:
            draw(name, results[name])
    page = PAGE.read_text()
    head, rest = page.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{figures(results)}\n\n{END}{rest.split(END)[1]}")
    print(f"drew {PAGE.name} from {RESULTS.name} of {results['machine']['date']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
