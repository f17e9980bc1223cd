"""Pictures and tables of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


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
        axes.legend()
    return figure


def lines(
    title: str, x_label: str, y_label: str, curves: Mapping[str, Sequence[tuple[float, float]]], *, log: bool = False
) -> Figure:
    """Return one curve `(x, y)` per name; `log` for a logarithmic x axis."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        ordered = sorted(points)
        axes.plot([x for x, _ in ordered], [y for _, y in ordered], marker="o" if len(ordered) < 12 else None, label=name)
    if log:
        axes.set_xscale("log")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.legend(fontsize="small")
    return figure
