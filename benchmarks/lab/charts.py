"""Pictures and tables of results."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

_COLOURS = 10
"""Colours of curves before they begin again, then dashed."""
_HEADING = 14
"""Letters in a line above a column of a sheet."""
_NAME = 16
"""Letters in a line beside a row of a sheet."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def bars(title: str, names: Sequence[str], groups: Mapping[str, Sequence[float]]) -> Figure:
    """Return bars side by side, one group of colours per entry of `groups`."""
    figure = Figure(figsize=(max(6, 0.9 * len(names)), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(groups)
    for number, (label, values) in enumerate(groups.items()):
        places = [index + (number - (len(groups) - 1) / 2) * width for index in range(len(names))]
        axes.bar(places, values, width, label=label)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_title(title)
    if len(groups) > 1:
        figure.legend(loc="outside right upper", fontsize="small")
    return figure


def lines(
    title: str, x_label: str, y_label: str, curves: Mapping[str, Sequence[tuple[float, float]]], *, log: bool = False
) -> Figure:
    """Return one curve `(x, y)` per name; `log` for a logarithmic x axis."""
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        ordered = sorted(points)
        style = "-" if number < _COLOURS else "--"
        marker = "o" if len(ordered) < 12 else None
        axes.plot([x for x, _ in ordered], [y for _, y in ordered], style, marker=marker, label=name)
    if log:
        axes.set_xscale("log")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def packed(images: Sequence[Image.Image]) -> str:
    """Return pictures of one size side by side as text that a JSON holds: a JPEG in base64."""
    content = io.BytesIO()
    Image.fromarray(np.concatenate([np.asarray(image.convert("RGB")) for image in images], axis=1)).save(
        content, "JPEG", quality=88
    )
    return base64.b64encode(content.getvalue()).decode()


def unpacked(text: str) -> Image.Image:
    """Return what `packed` packed, as one picture."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


def sheet(title: str, columns: Sequence[str], rows: Mapping[str, Image.Image]) -> Figure:
    """Return strips of pictures below each other, each with its name."""
    figure = Figure(figsize=(2 + 1.1 * len(columns), 0.8 + 1.15 * len(rows)), layout="constrained")
    for number, (axes, (name, strip)) in enumerate(
        zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows.items(), strict=True)
    ):
        axes.imshow(strip)
        side = strip.width / len(columns)
        headings = [fill(column, _HEADING) if number == 0 else "" for column in columns]
        axes.set_xticks([(index + 0.5) * side for index in range(len(columns))], headings)
        axes.xaxis.tick_top()
        axes.set_yticks([strip.height / 2], [fill(name, _NAME)])
        axes.tick_params(length=0, labelsize="small")
    figure.suptitle(title)
    return figure
