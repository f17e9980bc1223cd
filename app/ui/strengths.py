"""Sliders for the strengths of what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gradio as gr

from app.ui.live import EVENT


def build_strengths(chosen: gr.components.Component, strengths: gr.State, labels: Callable[[Any], Mapping[str, str]]) -> None:
    """Build a slider for each of what `labels` returns, name to label, for the value of `chosen`.

    `strengths` keeps what was set, by name.
    """

    @gr.render(inputs=[chosen, strengths], triggers=[chosen.change], show_progress="hidden", concurrency_limit=None)
    def show(value: Any, known: dict[str, float]) -> None:
        with gr.Row():
            for name, label in labels(value).items():
                how = {"label": f"Strength of {label}", "step": 0.05, "min_width": 220, "buttons": []}
                slider = gr.Slider(0, 1.5, known.get(name, 1.0), interactive=True, **how)
                slider.change(partial(_with_strength, name), [slider, strengths], strengths, **EVENT)


def _with_strength(name: str, value: float, known: dict[str, float]) -> dict[str, float]:
    return known | {name: value}
