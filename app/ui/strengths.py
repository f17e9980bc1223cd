"""Sliders for the strength of each of several concepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from app.ui import markup
from app.ui.live import EVENT, PIECE, Live, said

_IN_ORDER = {"concurrency_id": "strengths", "concurrency_limit": 1}
READS_STRENGTHS: dict[str, Any] = EVENT | _IN_ORDER
"""How events run that read strengths: after all that was set before."""
_STRONGEST = 1.5


def build_strengths(live: Live, chosen: gr.components.Component, labels: Callable[[Any], Mapping[str, str]]) -> gr.State:
    """Build a slider for each of what `labels` returns for the value of `chosen`: what is set, and what it is called.

    Returns:
        What was set, by name; what is not in it is 1. Events that read it run as `READS_STRENGTHS` says.
    """
    strengths = gr.State({})
    sliders = live.add(
        gr.HTML(js_on_load=markup.SLIDES + markup.CLICKS), lambda value, known: _sliders(labels(value), known), chosen, strengths
    )

    def set_strength(known: dict[str, float], event: gr.EventData) -> dict[str, float]:
        _, name, value = said(event)
        return known | {name: float(value)}

    sliders.click(set_strength, strengths, strengths, **PIECE | _IN_ORDER)
    return strengths


def _sliders(labels: Mapping[str, str], strengths: Mapping[str, float]) -> str:
    sliders = (
        markup.slider("strength", name, f"Strength of {label}", strengths.get(name, 1.0), _STRONGEST)
        for name, label in labels.items()
    )
    return f'<div class="sd-sliders">{"".join(sliders)}</div>' if labels else ""
