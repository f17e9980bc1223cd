"""Pictures drawn as SVG, in the colours of the page's theme: the loss curve and the band map."""

from __future__ import annotations

from collections.abc import Sequence

from app.ui.markup import table, text
from spectral_diffusion.adapters.band_map import BandMap, Share

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 190, 44, 24
_COLOURS = 8  # classes sd-c0 ... in style.css
_SMOOTHING = 0.1
_MOST_POINTS = 400


def loss_curve(losses: Sequence[tuple[int, float]], steps: int) -> str:
    """Return the loss by step, faint, and smoothed over about ten steps."""
    if len(losses) < 2:
        return '<p class="sd-empty">The curve begins with the first steps.</p>'
    smooth, value = [], losses[0][1]
    for step, loss in losses:
        value += _SMOOTHING * (loss - value)
        smooth.append((step, value))
    top = 1.05 * max(sorted(loss for _, loss in losses)[int(0.98 * len(losses)) - 1], max(loss for _, loss in smooth), 1e-6)
    lines = "".join(
        f'<polyline class="{kind}" points="{_points(values, steps, top)}"/>'
        for kind, values in (("raw", losses), ("smooth", smooth))
    )
    grid = "".join(_level(top * share, top) for share in (0.25, 0.5, 0.75))
    labels = (
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">step 0</text>'
        f'<text x="{_WIDTH - 2}" y="{_HEIGHT - 6}" text-anchor="end">{steps}</text>'
    )
    name = f"Loss by step: now {smooth[-1][1]:.3f} after step {losses[-1][0]} of {steps}"
    return f'<svg class="sd-curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">{grid}{lines}{labels}</svg>'


def band_map_chart(result: BandMap) -> str:
    """Return who owns which singular directions of which layers; shared ones are red."""
    left, width, height = 96, 520, 26
    shown = min(
        max(row.directions for row in result.rows),
        max(8 * -(-max(share.stop or 0 for row in result.rows for share in row.shares) // 8) + 8, 32),
    )
    strongest = max((share.energy for row in result.rows for share in row.shares), default=0.0) or 1.0
    parts = []
    for number, row in enumerate(result.rows):
        top = number * (height + 8)
        parts.append(f'<text x="0" y="{top + 17}">{text(row.group)}</text>')
        usable = min(row.directions, shown) / shown * width
        parts.append(f'<rect class="free" x="{left}" y="{top}" width="{usable:.1f}" height="{height}" rx="3"/>')
        for share in row.shares:
            start, stop = (share.start or 0, min(row.directions, shown) if share.stop is None else share.stop)
            x, wide = left + start / shown * width, (stop - start) / shown * width
            tall = 4 + (height - 4) * share.energy / strongest
            shape = f'x="{x:.1f}" y="{top + height - tall:.1f}" width="{max(wide - 1, 1):.1f}" height="{tall:.1f}" rx="2"'
            what = text(f"{share.token}: {_owned(share)}, energy {share.energy:.2f}")
            kind = f"sd-c{result.tokens.index(share.token) % _COLOURS}{' anywhere' if share.stop is None else ''}"
            parts.append(f'<rect class="{kind}" {shape}><title>{what}</title></rect>')
        for one, other in result.conflicts:
            parts.append(_conflict(row.shares, (one, other), left, top, width / shown, height))
    bottom = len(result.rows) * (height + 8) + 12
    parts.append(f'<text x="{left}" y="{bottom}">direction 0</text>')
    parts.append(f'<text x="{left + width}" y="{bottom}" text-anchor="end">{shown - 1}</text>')
    shares = {share.token: share for row in result.rows for share in row.shares}
    name = "Band map: " + "; ".join(f"{token} owns {_owned(share)}" for token, share in shares.items())
    chart = (
        f'<svg class="sd-bands" viewBox="0 0 {left + width + 4} {bottom + 6}" role="img" '
        f'aria-label="{text(name)}">{"".join(parts)}</svg>'
    )
    legend = "".join(
        f'<span class="sd-key"><span class="sd-c{number % _COLOURS}"></span>{text(token)}</span>'
        for number, token in enumerate(result.tokens)
    )
    return f'<div class="sd-legend">{legend}<span>height: how much it changes there</span></div>{chart}'


def cross_talk_table(result: BandMap) -> str:
    """Return how strongly each concept's change answers to the others' inputs."""
    head = ["answers to", *result.tokens]
    cells = {None: "not measured"}
    rows = [
        [f"inputs of {token}", *(cells.get(value) or f"{value:.0%}" for value in answers)]
        for token, answers in zip(result.tokens, result.cross_talk, strict=True)
    ]
    return table(head, rows)


def _owned(share: Share) -> str:
    if share.start is None or share.stop is None:
        return "no directions and may change all"
    return f"directions {share.start} to {share.stop - 1}"


def _points(values: Sequence[tuple[int, float]], steps: int, top: float) -> str:
    every = max(1, len(values) // _MOST_POINTS)
    chosen = [*values[::every], values[-1]]
    return " ".join(f"{_LEFT + step / steps * (_WIDTH - _LEFT):.1f},{_y(min(value, top), top):.1f}" for step, value in chosen)


def _y(value: float, top: float) -> float:
    return (_HEIGHT - _BOTTOM) * (1 - value / top)


def _level(value: float, top: float) -> str:
    y = _y(value, top)
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>'
    )


def _conflict(shares: Sequence, pair: tuple[str, str], left: float, top: float, scale: float, height: float) -> str:
    bands = [share for share in shares if share.token in pair]
    if len(bands) != 2:
        return ""
    start, stop = max(share.start for share in bands), min(share.stop for share in bands)
    return (
        f'<rect class="conflict" x="{left + start * scale:.1f}" y="{top}" width="{(stop - start) * scale:.1f}" height="{height}">'
        f"<title>{text(pair[0])} and {text(pair[1])} share directions {start} to {stop - 1}</title></rect>"
    )
