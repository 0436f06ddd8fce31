"""A contact sheet: what the images of a set look like, class by class, on one PNG."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from orchestrator.data.fetch import local_path
from orchestrator.data.images import ImageError, decode_image
from orchestrator.data.index import ShardIndex, load_members
from orchestrator.data.remote import is_url

TILE, GAP, MARGIN, HEAD, CAPTION = 112, 10, 28, 84, 26
ROWS_BY_CLASS, PER_CLASS = 12, 8
GRID_COLUMNS, GRID_CLASSES = 10, 60
MOST_SHARDS = 64
INK, SOFT, PAPER, TRAY = "#1c2430", "#6b7686", "#ffffff", "#eef1f5"


class Picture(NamedTuple):
    """One drawn sample; no pixels where it cannot be decoded."""

    label: int
    pixels: np.ndarray | None  # (H, W, 3) uint8


def draw_sheet(index: ShardIndex, max_pixels: int, path: Path) -> None:
    """Write the sheet: a row per class, or for more than 12 classes a grid with one sample of up to 60 of them."""
    by_row = index.num_classes <= ROWS_BY_CLASS
    labels = _spread(index.num_classes, index.num_classes if by_row else GRID_CLASSES)
    wanted = dict.fromkeys(labels, PER_CLASS if by_row else 1)
    pictures = sorted(_collect(index, wanted, max_pixels), key=lambda picture: picture.label)
    sheet = _draw_rows(index, labels, pictures) if by_row else _draw_grid(index, pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def _spread(total: int, most: int) -> list[int]:
    return sorted({i * total // min(total, most) for i in range(min(total, most))})


def _collect(index: ShardIndex, wanted: dict[int, int], max_pixels: int) -> Iterator[Picture]:
    """Shard by shard until every class is served; of a remote set only the first shard is fetched."""
    for shard in index.shards[: 1 if is_url(index.shards[0].location) else MOST_SHARDS]:
        path = local_path(shard)
        members = load_members(path, shard)
        with path.open("rb") as file:
            for i, label in enumerate(members.label.tolist()):
                if wanted.get(label, 0) > 0:
                    wanted[label] -= 1
                    data = os.pread(file.fileno(), int(members.image_size[i]), int(members.image_offset[i]))
                    yield Picture(label, _try_decode(data, max_pixels))
        if not any(wanted.values()):
            return


def _try_decode(data: bytes, max_pixels: int) -> np.ndarray | None:
    try:
        return decode_image(data, max_pixels)[0]
    except ImageError:
        return None


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu from matplotlib's wheel: the same on every machine, and it knows more than Latin."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def _blank(index: ShardIndex, width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    bold = _font(22, True)
    draw.text((MARGIN, MARGIN - 6), _fit(draw, index.name or "shards", bold, width - 2 * MARGIN), INK, bold)
    shards = f"{len(index.shards):,} shard{'s' if len(index.shards) > 1 else ''}"
    counts = f"{index.num_samples:,} samples · {index.num_classes:,} classes · {shards}"
    draw.text((MARGIN, MARGIN + 26), f"{counts} · {index.digest[:12]}", SOFT, _font(13))
    return sheet, draw


def _draw_rows(index: ShardIndex, labels: list[int], pictures: list[Picture]) -> Image.Image:
    names = 170
    width = 2 * MARGIN + names + PER_CLASS * (TILE + GAP) - GAP
    sheet, draw = _blank(index, width, HEAD + len(labels) * (TILE + GAP) - GAP + MARGIN)
    for row, label in enumerate(labels):
        y = HEAD + row * (TILE + GAP)
        name = _fit(draw, index.classes[label], _font(15, True), names - GAP)
        draw.text((MARGIN, y + TILE // 2 - 20), name, INK, _font(15, True))
        draw.text((MARGIN, y + TILE // 2 + 2), f"{index.class_counts[label]:,} samples", SOFT, _font(12))
        for column, picture in enumerate(p for p in pictures if p.label == label):
            _paste(sheet, picture, MARGIN + names + column * (TILE + GAP), y)
    return sheet


def _draw_grid(index: ShardIndex, pictures: list[Picture]) -> Image.Image:
    columns = min(GRID_COLUMNS, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    height = TILE + CAPTION + GAP
    sheet, draw = _blank(index, 2 * MARGIN + columns * (TILE + GAP) - GAP, HEAD + rows * height - GAP + MARGIN)
    for i, picture in enumerate(pictures):
        x, y = MARGIN + i % columns * (TILE + GAP), HEAD + i // columns * height
        _paste(sheet, picture, x, y)
        draw.text((x, y + TILE + 5), _fit(draw, index.classes[picture.label], _font(12), TILE), INK, _font(12))
    return sheet


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def _paste(sheet: Image.Image, picture: Picture, x: int, y: int) -> None:
    """Whole image, centred on a tray; small ones grow by whole factors so that their pixels stay square."""
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), TRAY)
    if picture.pixels is None:
        draw.text((x + TILE // 2, y + TILE // 2), "unreadable", SOFT, _font(12), anchor="mm")
        return
    image = Image.fromarray(picture.pixels)
    factor = TILE // max(image.size)
    if factor >= 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    sheet.paste(image, (x + (TILE - image.width) // 2, y + (TILE - image.height) // 2))
