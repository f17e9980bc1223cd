"""The tab Fuse: choose concepts and strengths, see the band map, fuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.actions import adapters as library
from app.actions.imports import Imported, add_lora
from app.actions.studio import Studio
from app.actions.trainings import train_again
from app.ui import markup
from app.ui.charts import band_map_chart, cross_talk_table
from app.ui.fold import folded
from app.ui.live import EVENT, PIECE, SLOW, Live, attempt, said
from app.ui.strengths import READS_STRENGTHS, build_strengths
from spectral_diffusion.errors import SpectralDiffusionError
from spectral_diffusion.joining import FUSERS
from spectral_diffusion.training.settings import SETTLING_STEPS

_AS_SUITS = "as suits them (sum or aligned)"
_WEIGHTS = [".safetensors", ".bin", ".pt"]


def build_fuse(studio: Studio, live: Live) -> None:
    """Build the tab."""
    chosen = live.offer(
        gr.CheckboxGroup([], label="Concepts", info="Choose two or more.", elem_id="fuse-chosen"),
        lambda: [(card.label, card.name) for card in library.adapter_cards(studio, ["adapters"])],
    )
    live.add(gr.HTML(), lambda: _hint(studio))
    _build_import(studio)
    strengths = build_strengths(live, chosen, lambda names: _labels(studio, names))
    bands = live.add(
        gr.HTML(elem_id="band-map", js_on_load=markup.CLICKS),
        lambda names, known: _bands(studio, sorted(names), known),
        chosen,
        strengths,
    )
    with gr.Row():
        title = gr.Textbox("", label="Name", placeholder="made from the tokens", max_length=60, min_width=240)
        method = gr.Dropdown(
            [(_AS_SUITS, ""), *((f"{name}: {fuser.help}", name) for name, fuser in FUSERS.items())],
            value="",
            label="How to join",
            min_width=240,
        )
    with gr.Row():
        wants_settling = gr.Checkbox(
            False,
            label="Settle",
            info="For concepts trained apart: a short training, without photos, teaches their sum what each gave alone.",
            elem_id="fuse-settle",
        )
        settling_steps = gr.Number(
            SETTLING_STEPS, label="Settling steps", minimum=1, precision=0, scale=0, min_width=160, elem_id="settling-steps"
        )
    wants_report = gr.Checkbox(
        True, label="Report", info="Draws every concept alone and fused, and says what is left of it.", elem_id="fuse-report"
    )
    start = gr.Button("Fuse", variant="primary", elem_id="fuse")
    fused = live.add(gr.HTML(elem_id="fused", js_on_load=markup.CLICKS), lambda: _fused(studio))
    asked = gr.State("")
    reports = live.add(gr.HTML(elem_id="reports", js_on_load=markup.CLICKS), lambda name: _reports(studio, name), asked)

    def begin(
        names: list[str], name: str, how: str, settle: bool, steps: float | None, report: bool, known: dict[str, float]
    ) -> Any:
        names = sorted(names)
        settling = int(steps or SETTLING_STEPS) if settle else 0
        options = {"title": name, "method": how or None, "settle": settling, "report": report}
        job = attempt(library.fuse, studio, names, [known.get(one, 1.0) for one in names], **options, done="Fusing …")
        return (gr.skip(), gr.skip()) if job is None else ("", "")

    def retrain(event: gr.EventData) -> None:
        do, name, _ = said(event)
        if do == "retrain":
            attempt(train_again, studio, name, done="It is trained again, on a free band.")

    def remove(event: gr.EventData) -> None:
        do, name, _ = said(event)
        if do == "remove":
            attempt(library.remove_adapter, studio, name, done="It lies among the removed ones.")

    def show_report(event: gr.EventData) -> Any:
        do, name, _ = said(event)
        if do == "report":
            attempt(library.report, studio, name, done="The report is queued.")
        return name

    chosen.change(lambda names: _wants_settling(studio, sorted(names)), chosen, wants_settling, **EVENT)
    asked_for = [chosen, title, method, wants_settling, settling_steps, wants_report, strengths]
    start.click(begin, asked_for, [title, asked], **READS_STRENGTHS)
    reports.click(show_report, None, asked, **PIECE)
    bands.click(retrain, **PIECE)
    fused.click(remove, **PIECE)


def _build_import(studio: Studio) -> None:
    """Build what makes a concept of a LoRA that another tool trained."""
    with folded("Import a LoRA", elem_id="import"):
        gr.Markdown(
            "A LoRA that another tool trained on Stable Diffusion 1, 2 or XL becomes a concept to choose above. If it lay beside "
            "an `adapter_config.json`, as PEFT’s do, give that with it: it says how strong the LoRA is."
        )
        with gr.Row():
            class_word = gr.Textbox(
                "", label="What does it show?", placeholder="ohwx cat", max_length=60, min_width=240,
                info="The words it was trained on; without an embedding the token stands for them.",
            )  # fmt: skip
            token = gr.Textbox(
                "", label="Its new token", placeholder="<friend>", info="The word that will call it in prompts.",
                max_length=64, min_width=240,
            )  # fmt: skip
        with gr.Row():
            lora = gr.File(
                label="LoRA", file_count="multiple", file_types=[*_WEIGHTS, ".json"], height=140, elem_id="lora", min_width=240
            )
            embedding = gr.File(
                label="Its embedding, if it came with one", file_types=_WEIGHTS, height=140, elem_id="embedding", min_width=240
            )
        start = gr.Button("Import", elem_id="import-lora")
        imported = gr.HTML(elem_id="imported")

    def begin(files: list[str] | None, word: str, name: str, vectors: str | None) -> tuple[Any, ...]:
        given, beside = [Path(file) for file in files or ()], Path(vectors) if vectors else None
        made = attempt(add_lora, studio, given, name, word, beside)
        return (gr.skip(),) * 5 if made is None else (_imported(made), "", "", None, None)

    fields = [class_word, token, lora, embedding]
    start.click(begin, [lora, class_word, token, embedding], [imported, *fields], **SLOW)


def _imported(made: Imported) -> str:
    if made.name is None:
        words = f"Nothing in the file tells which base {made.token} is for; a job tries the one in the tab Settings."
        return markup.muted(words)
    return markup.muted(f"{made.token} is imported: choose it above.") + "".join(map(markup.refusal, made.remarks))


def _labels(studio: Studio, names: list[str]) -> dict[str, str]:
    labels = {card.name: card.label for card in library.adapter_cards(studio, ["adapters"])}
    return {name: labels.get(name, name) for name in sorted(names)}


def _wants_settling(studio: Studio, names: list[str]) -> bool:
    try:
        return library.needs_settling(studio, names)
    except SpectralDiffusionError:  # an adapter may be gone or damaged by now; the band map says so
        return False


def _hint(studio: Studio) -> str:
    trained = library.adapter_cards(studio, ["adapters"])
    if len(trained) >= 2:
        return ""
    return markup.empty("Fusing needs two concepts. Train them in the tab Concepts, run the tour there, or import a LoRA.")


def _bands(studio: Studio, names: list[str], strengths: dict[str, float]) -> str:
    if not names:
        return (
            markup.empty("Choose concepts to see which singular directions each owns.")
            if library.adapter_cards(studio, ["adapters"])
            else ""
        )
    try:
        result = library.map_bands(studio, names, [strengths.get(name, 1.0) for name in names])
        imported = library.imported_tokens(studio, names)
        apart = len(names) > 1 and library.trained_apart(studio, names)
        settles = library.needs_settling(studio, names)
    except SpectralDiffusionError as error:  # an adapter may be gone or damaged by now
        return markup.refusal(str(error))
    parts = [markup.heading("Band map"), band_map_chart(result)]
    for one, other in result.conflicts:
        name = names[result.tokens.index(other)].removeprefix("adapters/").removesuffix(".safetensors")
        words = f"{one} and {other} share singular directions, so they cannot be fused without damage."
        again = markup.button("retrain", name, f"Train {other} again on a free band")
        parts.append(f'<div class="sd-warning"><p>{markup.text(words)}</p>{again}</div>')
    if imported and len(names) > 1:
        who = f"{' and '.join(imported)} {'was' if len(imported) == 1 else 'were'} imported"
        words = f"{who}: choose “sum” under “How to join”. Nothing keeps imported ones from disturbing others."
        parts.append(f'<div class="sd-warning"><p>{markup.text(words)}</p></div>')
    elif apart:
        cure = "“Settle” teaches it back, without photos." if settles else "Trained in one go they would keep it."
        words = f"These were trained apart and lose identity in one adapter. {cure}"
        parts.append(f'<div class="sd-warning"><p>{markup.text(words)}</p></div>')
    if len(names) > 1:
        parts += [markup.heading("Measured cross-talk"), cross_talk_table(result)]
        parts.append(markup.muted("How strongly each concept’s change answers to the others’ inputs; 100 % is its own answer."))
    return "".join(parts)


def _fused(studio: Studio) -> str:
    """Return what was fused and imported here; a concept's own adapter is removed with the concept."""
    cards = [card for card in library.adapter_cards(studio) if not library.is_of_a_concept(studio, card)]
    if not cards:
        return ""
    rows = [
        [card.path.stem, " + ".join(card.tokens), ", ".join(card.bands), card.method if card.is_fused else "—"] for card in cards
    ]
    ends = [
        markup.button("remove", card.name, "✕", kind="sd-quiet", title=f"Remove {card.label}", confirm=f"Remove {card.label}?")
        for card in cards
    ]
    return markup.heading("Fused and imported") + markup.table(["name", "concepts", "bands", "joined by", ""], rows, ends)


def _reports(studio: Studio, asked: str) -> str:
    """Return a button per fused adapter, and the report that was asked for or else the newest."""
    cards = library.adapter_cards(studio, ["fused"])
    found = {card.name: path for card in cards if (path := library.report_file(studio, card)) is not None}
    buttons = "".join(
        markup.button("show", card.name, f"Report on {card.path.stem}")
        if card.name in found
        else markup.button("report", card.name, f"Draw a report on {card.path.stem}", kind="sd-quiet")
        for card in cards
    )
    if not found:
        return f'<div class="sd-row">{buttons}</div>' if cards else ""
    name = asked if asked in found else max(found, key=lambda one: found[one].stat().st_mtime_ns)
    path = found[name]
    page = markup.heading(f"What {path.stem} kept") + markup.frame(path, f"Report on {path.stem}")
    save = markup.link(path, "Save page", download=True)
    return f'<div class="sd-row">{buttons}</div>{page}<div class="sd-row sd-end">{save}</div>'
