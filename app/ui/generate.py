"""The tab Generate: prompt and settings, and the pictures with their scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from app.actions import pictures as library
from app.actions.adapters import adapter_cards, library_class_words, trained_apart
from app.actions.studio import Studio
from app.ui import markup
from app.ui.fold import folded
from app.ui.live import EVENT, PIECE, Live, attempt, choices, said
from app.ui.regions import ACTING, build_regions, show_regions
from spectral_diffusion.errors import SpectralDiffusionError
from spectral_diffusion.generation.drawing import SCHEDULERS, Drawing
from spectral_diffusion.generation.picture_file import read_drawing
from spectral_diffusion.generation.regions import Region

BARE = "none"
"""Value of the choice to draw without an adapter."""

DROPS = """
if (!window.takesDroppedPictures) {
  window.takesDroppedPictures = true;
  document.addEventListener('dragover', (event) => event.preventDefault());
  document.addEventListener('drop', (event) => {
    if (event.defaultPrevented) return;
    event.preventDefault();
    const field = document.querySelector('#drop-settings input[type=file]'), files = event.dataTransfer.files;
    if (!field || files.length !== 1 || files[0].type !== 'image/png') return;
    field.files = files;
    field.dispatchEvent(new Event('change', {bubbles: true}));
  });
}
"""
"""JavaScript: a PNG dropped anywhere but on another field goes to the field that loads settings."""


def build_generate(studio: Studio, live: Live) -> None:
    """Build the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            adapter = adapter_list(studio, live, "Adapter")
            prompt = gr.Textbox(
                "", label="Prompt", lines=2, placeholder="<poodle> and <black-cat> near a lake", elem_id="prompt", max_length=2000
            )
            chips = live.add(gr.HTML(elem_id="chips", js_on_load=markup.CLICKS), lambda name: _chips(studio, name), adapter)
            *fields, whole = drawing_fields()
            regions, confined, shown = build_regions(studio, adapter, prompt)
            condition = condition_fields()
            start = gr.Button("Draw", variant="primary", elem_id="draw")
            dropped = gr.File(
                label="Drop a picture to load its settings",
                file_types=[".png"],
                height=160,
                elem_id="drop-settings",
            )
        with gr.Column(scale=3, min_width=300):
            sort = gr.Radio(list(library.SORTS), value=library.SORTS[0], label="Order", elem_id="order")
            live.add(gr.HTML(elem_id="forming"), lambda: _forming(studio))
            album = live.add(
                gr.HTML(elem_id="pictures", js_on_load=markup.CLICKS + DROPS), lambda order: show_album(studio, order), sort
            )
    settings = [prompt, *fields, regions, confined]
    loaded = [*settings, *shown]

    def begin(
        name: str | None, attach_all: bool, sketch: str | None, photo: bool, reader: str, strength: float, *values: Any
    ) -> None:
        following = (sketch, photo, reader, strength)
        drawing = attempt(lambda: replace(read_fields(*values), condition=library.condition_from(*following)))
        if drawing is not None:
            attempt(
                library.generate,
                studio,
                None if name in (None, BARE) else name,
                drawing,
                whole=attach_all,
                done=f"Drawing with seed {drawing.seed}.",
            )

    def add_chip(words: str, event: gr.EventData) -> str:
        _, token, _ = said(event)
        return f"{words.rstrip()} {token}".strip()

    def copy_settings(event: gr.EventData) -> Any:
        _, name, _ = said(event)
        path = attempt(studio.file, "pictures", name)
        return [gr.skip()] * len(loaded) if path is None else load(path)

    def load_dropped(file: str | None) -> Any:
        return [*([gr.skip()] * len(loaded) if file is None else load(Path(file))), None]

    def load(path: Path) -> list[Any]:
        drawing = attempt(read_drawing, path, done="Settings loaded.")
        if drawing is None:
            return [gr.skip()] * len(loaded)
        return [*field_values(drawing), *show_regions(studio, drawing.regions)]

    start.click(begin, [adapter, whole, *condition, *settings], **EVENT)
    prompt.submit(begin, [adapter, whole, *condition, *settings], **EVENT)
    chips.click(add_chip, prompt, prompt, **PIECE)
    album.click(copy_settings, None, loaded, **PIECE)
    dropped.upload(load_dropped, dropped, [*loaded, dropped], **EVENT)


def condition_fields() -> list[Any]:
    """Build what a drawing follows: a sketch or pose, whether it is to be traced, its T2I-Adapter, and how strictly."""
    with folded("Sketch or pose to follow", elem_id="condition"):
        sketch = gr.File(label="Picture: white lines on black, or a pose", file_types=["image"], height=140)
        photo = gr.Checkbox(False, label="It is a photo or drawing: trace its outlines")
        reader = gr.Textbox(
            "",
            label="T2I-Adapter",
            info="The embedded base has its own, for sketches.",
            placeholder="a diffusers folder or a hub id",
            max_length=500,
        )
        strength = gr.Slider(0, 2, 1, step=0.05, label="How strictly", buttons=[])
    return [sketch, photo, reader, strength]


def adapter_list(
    studio: Studio, live: Live, label: str, kinds: tuple[str, ...] = ("fused", "adapters"), *, bare: bool = True
) -> gr.Dropdown:
    """Return a list of adapters that keeps itself fresh, hidden while there are none; the bare base may be among them.

    It stands at the adapter that was fused last, until somebody chooses one.
    """
    component, chosen = gr.Dropdown([], label=label, allow_custom_value=False, min_width=240), gr.State(False)
    component.input(lambda: True, None, chosen, **EVENT)

    def fresh(current: str | None, is_chosen: bool) -> Any:
        cards = adapter_cards(studio, kinds)
        pairs = [(card.label, card.name) for card in cards]
        fused = [card for card in cards if card.is_fused]
        value = current if is_chosen or not fused else max(fused, key=lambda card: card.changed).name
        return choices([*pairs, *([("none, the bare base", BARE)] if bare and pairs else [])], value=value)

    return live.add(component, fresh, component, chosen)


def drawing_fields() -> list[Any]:
    """Build the settings of a drawing beside its prompt, in the order that `read_fields` takes them, and who is attached."""
    negative = negative_field()
    with gr.Row():
        count = gr.Number(4, label="Pictures", minimum=1, maximum=library.MOST_DRAWN, precision=0, min_width=90)
        seed = gr.Number(-1, label="Seed (-1: any)", precision=0, min_width=110)
    with folded("More settings"):
        sampling = sampling_fields()
        whole = gr.Checkbox(
            False,
            label="Attach all concepts",
            info="As an exported file does; else only those are attached that the prompt names.",
            elem_id="whole",
        )
    return [negative, count, seed, *sampling, whole]


def negative_field() -> gr.Textbox:
    """Build the field for what shall not be drawn."""
    return gr.Textbox("", label="Not in the picture", placeholder="blurred", max_length=2000)


def sampling_fields() -> list[Any]:
    """Build the settings of how a picture is drawn, in the order that `read_fields` takes them."""
    return [
        gr.Dropdown(list(SCHEDULERS), value=Drawing.scheduler, label="Sampler"),
        gr.Slider(1, 100, Drawing.steps, step=1, label="Steps", buttons=[]),
        gr.Slider(0, 15, 0, step=0.5, label="Guidance (0: the base's own)", buttons=[]),
        gr.Textbox("", label="Size", placeholder="the base's own, or 512x768", max_length=12),
    ]


def read_fields(
    prompt: str,
    negative: str,
    count: float | None,
    seed: float | None,
    sampler: str,
    steps: float,
    guidance: float,
    size: str,
    regions: tuple[Region, ...] = (),
    acting: str = next(iter(ACTING)),
) -> Drawing:
    """Return what the fields of a drawing say."""
    return library.drawing_from(
        {
            "prompt": prompt,
            "negative_prompt": negative,
            "count": int(count or 1),
            "seed": int(-1 if seed is None else seed),
            "scheduler": sampler,
            "steps": int(steps),
            "guidance": float(guidance) or None,
            "size": library.parse_size(size),
            "regions": regions,
            "confined": ACTING[acting],
        }
    )


def field_values(drawing: Drawing) -> list[Any]:
    """Return the fields of a drawing, in the order that `read_fields` takes them."""
    size = f"{drawing.size[0]}x{drawing.size[1]}" if drawing.size else ""
    how = [drawing.scheduler, drawing.steps, drawing.guidance or 0, size]
    acting = next(name for name, confined in ACTING.items() if confined is drawing.confined)
    return [drawing.prompt, drawing.negative_prompt, drawing.count, drawing.seed, *how, drawing.regions, acting]


def _chips(studio: Studio, adapter: str | None) -> str:
    if adapter in (None, BARE):
        return markup.muted("Choose an adapter to use its tokens.")
    try:
        tokens = list(library_class_words(studio, adapter))
        apart = trained_apart(studio, [adapter])
    except SpectralDiffusionError as error:  # it may be gone by now
        return markup.refusal(str(error))
    buttons = "".join(markup.button("chip", token, token, kind="sd-chip", title=f"Add {token} to the prompt") for token in tokens)
    hint = "Trained apart: with a box for each, under Regions, none disturbs another."
    return f'<div class="sd-row">{buttons}</div>{markup.muted(hint) if apart else ""}'


def _forming(studio: Studio) -> str:
    now = library.forming(studio)
    if now is None:
        return ""
    content, seed = now
    picture = f'<img src="{markup.webp_address(content)}" alt="the picture of seed {seed}, as it forms">'
    return f'<div class="sd-row sd-forming">{picture}<span class="sd-muted">seed {seed} is forming …</span></div>'


def show_album(studio: Studio, sort: str) -> str:
    """Return the pictures in the order of `sort`; of one without scores whether they are still to come."""
    cards = library.picture_cards(studio, sort)
    if not cards:
        return markup.empty("No pictures yet. Write a prompt with a token and press Draw.")
    under_way = {job.name for job in studio.jobs.jobs() if not job.state.ended}
    return f'<div class="sd-cards">{"".join(_picture(card, is_awaited=card.job in under_way) for card in cards)}</div>'


def _picture(card: library.PictureCard, *, is_awaited: bool) -> str:
    scores = [] if card.clip_text is None else [f"text {card.clip_text:.2f}"]
    scores += [f"{token} {value:.2f}" for token, value in card.clip_image.items()]
    lines = markup.text(" · ".join(scores)) or ("being scored …" if is_awaited else "not scored")
    picture = markup.image(card.path, f"{card.prompt}, seed {card.seed}")
    copy = markup.button("copy", card.path.name, "Copy settings", title=f"Copy the settings of seed {card.seed} into the fields")
    save = markup.link(card.path, "Save", download=True)
    judged = f'<span class="sd-muted">judge: {markup.text(", ".join(card.judged[:2]))}</span>' if card.judged else ""
    return (
        f'<div class="sd-card sd-picture"><a href="{markup.text(markup.file_url(card.path))}" target="_blank" rel="noopener">'
        f'{picture}</a><div class="sd-body"><span class="sd-prompt">{markup.text(card.prompt)}</span>'
        f'<span class="sd-muted">seed {card.seed} · {lines}</span>{judged}<div class="sd-tools">{copy}{save}</div></div></div>'
    )
