"""Lay out pictures in labelled rows, with a line of scores under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 160
LABEL_WIDTH = 150
LINE = 13
BACKGROUND, INK, FAINT = (250, 250, 252), (28, 28, 34), (104, 104, 116)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture and a few short lines under it."""

    image: Image.Image
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pictures with one label before them."""

    label: str
    cells: tuple[Cell, ...]


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """Return the rows as one RGB picture; each picture is shown `CELL` pixels wide."""
    most = max(len(row.cells) for row in rows)
    font = ImageFont.load_default(11)
    bold = ImageFont.load_default(13)
    heights = [CELL + 8 + LINE * max((len(cell.lines) for cell in row.cells), default=0) + 8 for row in rows]
    sheet = Image.new("RGB", (LABEL_WIDTH + most * (CELL + 6) + 6, sum(heights) + 8), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = 8
    for row, height in zip(rows, heights, strict=True):
        draw.multiline_text((8, top + 4), row.label, INK, bold, spacing=4)
        for column, cell in enumerate(row.cells):
            left = LABEL_WIDTH + column * (CELL + 6)
            sheet.paste(_fitted(cell.image), (left, top))
            for number, line in enumerate(cell.lines):
                draw.text((left, top + CELL + 3 + number * LINE), line, FAINT, font)
        top += height
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    scale = CELL / max(image.size)
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL, CELL), BACKGROUND)
    cell.paste(small, ((CELL - small.width) // 2, (CELL - small.height) // 2))
    return cell
