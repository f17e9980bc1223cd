"""The tab Export: the file for other tools, and where to put it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.actions.adapters import FORMATS, adapter_cards, export
from app.actions.studio import Studio
from app.jobs import State
from app.ui import markup
from app.ui.generate import adapter_list
from app.ui.live import Live, attempt
from app.ui.strengths import READS_STRENGTHS, build_strengths
from spectral_diffusion.export import PRECISIONS

_MOST_SHOWN = 6


def build_export(studio: Studio, live: Live) -> None:
    """Build the tab."""
    gr.Markdown("One zip with the files for other tools, a picture, and a note of where each file goes and what to type.")
    with gr.Row():
        adapter = adapter_list(studio, live, "Adapter", bare=False)
        format = gr.Dropdown(
            [(f"{name}: {words}", name) for name, words in FORMATS.items()], value="kohya", label="Format", min_width=240
        )
    with gr.Row():
        precision = gr.Radio(
            list(PRECISIONS), value=next(iter(PRECISIONS)), label="Precision", info="fp16 is what other tools expect."
        )
        rank = gr.Number(
            0, label="Rank", info="0: exact. A smaller rank makes a smaller LoRA; its error is measured.", minimum=0, precision=0,
            min_width=240,
        )  # fmt: skip
    strengths = build_strengths(live, adapter, lambda name: {token: token for token in _tokens(studio, name)})
    start = gr.Button("Export", variant="primary", elem_id="export")
    live.add(gr.HTML(elem_id="exports"), lambda: _results(studio))

    def begin(name: str | None, form: str, how: str, columns: float | None, known: dict[str, float]) -> None:
        factors = {token: known[token] for token in _tokens(studio, name) if token in known}
        options = {"format": form, "rank": int(columns) if columns else None, "strengths": factors}
        attempt(export, studio, name or "", how, **options, done="Exporting …")

    start.click(begin, [adapter, format, precision, rank, strengths], **READS_STRENGTHS)


def _tokens(studio: Studio, name: str | None) -> tuple[str, ...]:
    return next((card.tokens for card in adapter_cards(studio) if card.name == name), ())


def _results(studio: Studio) -> str:
    done = [job for job in studio.jobs.jobs() if job.kind == "export" and job.state is State.DONE][:_MOST_SHOWN]
    if not done:
        return markup.empty("Nothing exported yet. Choose an adapter, then Export.")
    return "".join(_result(studio, job.result) for job in done)


def _result(studio: Studio, result: dict[str, Any]) -> str:
    path = studio.folder("exports") / result["file"]
    words = ", ".join(f"{token} is typed {word}" for token, word in result["words"].items())
    facts = [f"rank {result['rank']}"] if result["rank"] is not None else []
    if result.get("rank_errors"):
        facts.append(f"compressed, with a relative error of {result['rank_errors']['overall']:.1e}")
    if result["error"] is not None:
        facts.append(f"reloaded with diffusers it differs by {result['error']:.1e} at most")
    size = f"{result['bytes'] / 1e6:.1f} MB"
    notes = "".join(f"<li>{markup.text(note)}</li>" for note in result["notes"])
    names = ", ".join(result["names"])
    download = markup.link(path, f"Download, {size}", download=True)
    return (
        f'{markup.heading(result["file"])}<div class="sd-row">{download}'
        f'<span class="sd-muted">{markup.text("; ".join(facts))}</span></div>'
        f'{markup.muted(f"{words}. In the zip: {names}.")}<ul class="sd-notes">{notes}</ul>'
    )
