"""The tab Compare: grids of pictures with their scores."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.actions import pictures as library
from app.actions.adapters import adapter_cards
from app.actions.studio import Studio
from app.jobs import State
from app.ui import markup
from app.ui.fold import folded
from app.ui.generate import negative_field, read_fields, sampling_fields
from app.ui.live import EVENT, Live, attempt
from spectral_diffusion.adapters.adapter import METHODS
from spectral_diffusion.reports.axis import AXES, Axis

_EXAMPLES = {
    "seed": "1, 2, 3",
    "prompt": "one prompt per line",
    "steps": "10, 25, 50",
    "guidance": "3, 5, 8",
    "sampler": "DDIM, Euler a",
    "strength": "0.5, 0.8, 1",
    "method": ", ".join(METHODS),
    "adapter": "names as in the list above, or none",
}
_MOST_SHOWN = 6


def build_compare(studio: Studio, live: Live) -> None:
    """Build the tab."""
    chosen = live.offer(
        gr.CheckboxGroup(
            [], label="Adapters", info="The first one draws, unless an axis is “adapter”.", elem_id="compare-adapters"
        ),
        lambda: [(f"{card.label} as “{card.path.stem}”", card.name) for card in adapter_cards(studio)],
    )
    prompt = gr.Textbox("", label="Prompt", placeholder="<poodle> near a lake", max_length=2000, elem_id="compare-prompt")
    with gr.Row():
        negative = negative_field()
        seed = gr.Number(1, label="Seed (-1: any)", precision=0, min_width=120)
    with folded("More settings"):
        sampling = sampling_fields()
    with gr.Row():
        x_name, x_values = _axis("Across", "seed", "1, 2, 3")
        y_name, y_values = _axis("Down", "strength", "0.6, 1")
    start = gr.Button("Compare", variant="primary", elem_id="compare")
    live.add(gr.HTML(elem_id="comparisons"), lambda: _results(studio))

    def begin(names: list[str], x: str, across: str, y: str, down: str, words: str, *fields: Any) -> None:
        attempt(_compare, studio, names, (x, across), (y, down), words, *fields, done="The grid is queued.")

    start.click(begin, [chosen, x_name, x_values, y_name, y_values, prompt, negative, seed, *sampling], **EVENT)


def _axis(label: str, name: str, values: str) -> tuple[gr.Dropdown, gr.Textbox]:
    with gr.Column(min_width=260):
        axis = gr.Dropdown(list(AXES), value=name, label=label)
        field = gr.Textbox(
            values, label=f"{label}: values", info="Between commas; prompts on lines of their own.", lines=2, max_length=2000
        )
    axis.change(lambda chosen: gr.update(placeholder=_EXAMPLES[chosen], value=""), axis, field, **EVENT)
    return axis, field


def _compare(
    studio: Studio, names: list[str], across: tuple[str, str], down: tuple[str, str],
    prompt: str, negative: str, seed: float | None, *sampling: Any,
) -> str:  # fmt: skip
    x, y = _parse(*across), _parse(*down)
    prompts = [str(axis.values[0]) for axis in (x, y) if axis.name == "prompt"]
    words = prompt if prompt.strip() or not prompts else prompts[0]
    return library.compare(studio, names or [], read_fields(words, negative, 1, seed, *sampling), x, y)


def _parse(name: str, values: str) -> Axis:
    return Axis.parse(name, values.splitlines() if name == "prompt" else values.replace("\n", ",").split(","))


def _results(studio: Studio) -> str:
    done = [job for job in studio.jobs.jobs() if job.kind == "compare" and job.state is State.DONE][:_MOST_SHOWN]
    if not done:
        return markup.empty("No grids yet. Choose what differs across and down, then Compare.")
    return "".join(_result(studio, job.result, job.title) for job in done)


def _result(studio: Studio, result: dict[str, Any], title: str) -> str:
    sheet, scores = studio.folder("comparisons") / result["sheet"], studio.folder("comparisons") / result["table"]
    links = (
        markup.link(sheet, "Open")
        + markup.link(sheet, "Save picture", download=True)
        + markup.link(scores, "Save table (CSV)", download=True)
    )
    picture = markup.image(sheet, f"{title}: a grid of pictures with scores", kind="sd-sheet")
    return f'{markup.heading(title)}<div class="sd-scroll">{picture}</div><div class="sd-row sd-end">{links}</div>'
