"""Writes a run's page: one HTML file that needs neither network nor scripts, the same bytes for the same record."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.track import sections, words
from orchestrator.track.charts import draw_charts
from orchestrator.track.runs import RunRecord, history, load_run
from orchestrator.track.spent import spent

NUMBERED_UP_TO = 20
"""Classes whose confusion matrix still shows its counts; a larger one is a picture."""
AS_IT_IS_UP_TO = 12_000
"""Bytes of a picture that goes into the page unchanged; a larger one is scaled and recompressed."""
THUMBNAIL = 160


def write_report(run_folder: Path) -> Path:
    """Render ``report.html`` from whatever the run folder holds so far; replaced in one piece."""
    page = render(load_run(run_folder))
    path = run_folder / "report.html"
    draft = path.with_suffix(".html.tmp")
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, path)
    return path


def render(run: RunRecord) -> str:
    """The page of one record."""
    from jinja2 import ChainableUndefined, Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("orchestrator.track", "."),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = draw_charts(history(run.events), run.events)
    template = environment.get_template("report.html.j2")
    return template.render(run=run, charts=[(chart, Markup(chart.svg)) for chart in charts], **_parts(run))


def _parts(run: RunRecord) -> dict[str, Any]:
    evaluation = run.evaluation or {}
    return {
        "top1": sections.score(run, 1),
        "top5": sections.score(run, 5),
        "headline": sections.headline(run),
        "facts": sections.facts(run),
        "commands": sections.commands(run),
        "failure": sections.failure(run),
        "attempts": sections.attempts(run),
        "reading": sections.reading(run),
        "spent": _drawn(spent(run)),
        "config": sections.config_rows(run),
        "environment": sections.environment(run),
        "evaluation": evaluation,
        "matrix": confusion(evaluation),
        "pairs": sections.confused_pairs(evaluation),
        "classes": sections.class_bars(evaluation),
        "samples": {kind: _pictures(run.folder, evaluation.get(kind) or []) for kind in ("worst", "best")},
        "last_event": words.moment(next((e["t"] for e in reversed(run.events) if "t" in e), None)),
    }


def _drawn(parts: dict[str, Any] | None) -> dict[str, Any] | None:
    from markupsafe import Markup

    return parts and {**parts, "bar": Markup(parts["bar"])}


def confusion(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """The matrix as numbered cells where they can be read, as a picture up to 100 classes, else nothing."""
    matrix, names = evaluation.get("confusion"), evaluation.get("classes") or []
    if not matrix:
        return None
    shades = [[words.share(count, sum(row)) for count in row] for row in matrix]
    if len(matrix) > NUMBERED_UP_TO:
        return {"names": names, "picture": _heat_picture(shades)}
    rows = [
        {"name": name, "cells": [{"count": n, "shade": round(s, 3), "hit": i == j} for j, (n, s) in enumerate(pair)]}
        for i, (name, pair) in enumerate((name, list(zip(*rows, strict=True)))
                                         for name, *rows in zip(names, matrix, shades, strict=True))
    ]  # fmt: skip
    return {"names": names, "rows": rows}


def _heat_picture(shades: Sequence[Sequence[float]]) -> str:
    """One pixel per cell, hits in blue and misses in orange, transparent where nothing is: fits light and dark."""
    from PIL import Image

    image = Image.new("RGBA", (len(shades), len(shades)))
    for i, row in enumerate(shades):
        for j, shade in enumerate(row):
            alpha = round(255 * min(1.0, shade**0.5)) if shade else 0
            image.putpixel((j, i), (*((56, 116, 203) if i == j else (216, 104, 32)), alpha))
    return _data_uri(_encoded(image, "PNG"), "png")


def _pictures(folder: Path, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**sample, "source": _picture(folder / str(sample.get("image") or ""))} for sample in samples]


def _picture(path: Path) -> str | None:
    """The picture as a data URI; None when it is not there or cannot be read."""
    try:
        content = path.read_bytes()
        small = len(content) <= AS_IT_IS_UP_TO and content.startswith(b"\x89PNG")
        return _data_uri(content, "png") if small else _data_uri(_shrunk(content), "jpeg")
    except (OSError, ValueError):
        return None


def _shrunk(content: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return _encoded(image.convert("RGB"), "JPEG", quality=82)


def _encoded(image: Any, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, optimize=True, **options)
    return buffer.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
