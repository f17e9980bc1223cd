"""Regions on the page: boxes over the latest picture, dragged or typed, each with a prompt of its own."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.actions import regions as actions
from app.actions.pictures import picture_cards
from app.actions.studio import Studio
from app.ui import markup
from app.ui.live import EVENT, PIECE, attempt, said
from app.ui.painter import PAINTING, brushes, canvas, coloured, painted
from spectral_diffusion.generation.regions import Region

_COLOURS = 6  # classes sd-c0 ... in style.css
DRAGS = """
const step = 0.02, least = 0.05;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const round = (value) => Math.round(value * 1000) / 1000;
const edges = (box) => box.dataset.edges.split(',').map(Number);
const place = (box, [left, top, right, bottom]) => {
  box.dataset.edges = [left, top, right, bottom].map(round).join(',');
  Object.assign(box.style, {left: left * 100 + '%', top: top * 100 + '%', width: (right - left) * 100 + '%',
    height: (bottom - top) * 100 + '%'});
};
const shifted = ([left, top, right, bottom], x, y, resize) => {
  if (resize) return [left, top, clamp(right + x, left + least, 1), clamp(bottom + y, top + least, 1)];
  const dx = clamp(x, -left, 1 - right), dy = clamp(y, -top, 1 - bottom);
  return [left + dx, top + dy, right + dx, bottom + dy];
};
const tell = (box) => trigger('click', {do: 'region-box', name: box.dataset.name, value: box.dataset.edges});
let drag = null;
element.addEventListener('pointerdown', (event) => {
  const box = event.target.closest('.sd-box');
  if (!box) return;
  drag = {box, from: edges(box), x: event.clientX, y: event.clientY, resize: event.target.classList.contains('sd-handle')};
  box.setPointerCapture(event.pointerId);
  event.preventDefault();
  box.focus();
});
element.addEventListener('pointermove', (event) => {
  if (!drag) return;
  const canvas = drag.box.parentElement.getBoundingClientRect();
  const x = (event.clientX - drag.x) / canvas.width, y = (event.clientY - drag.y) / canvas.height;
  place(drag.box, shifted(drag.from, x, y, drag.resize));
});
const drop = () => {
  if (drag && drag.box.dataset.edges !== drag.from.map(round).join(',')) tell(drag.box);
  drag = null;
};
element.addEventListener('pointerup', drop);
element.addEventListener('pointercancel', drop);
element.addEventListener('keydown', (event) => {
  const box = event.target.closest('.sd-box');
  const by = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step]}[event.key];
  if (!box || !by) return;
  event.preventDefault();
  place(box, shifted(edges(box), by[0], by[1], event.shiftKey));
});
element.addEventListener('keyup', (event) => {
  const box = event.target.closest('.sd-box');
  if (box && event.key.startsWith('Arrow')) tell(box);
});
"""
"""JavaScript of the boxes: dragged or moved by arrow keys, resized at the corner or with Shift."""


ACTING: dict[str, bool | None] = {"as they were trained": None, "in its own box only": True, "everywhere": False}
"""What `Drawing.confined` is called."""


def build_regions(studio: Studio, adapter: Any, prompt: Any) -> tuple[gr.State, gr.Radio, tuple[gr.Accordion, gr.HTML]]:
    """Build the part; return the regions' state, where each concept acts, and what `show_regions` fills."""
    regions = gr.State(())
    with gr.Accordion("Regions: what stands where", open=False, elem_id="regions") as part:
        gr.Markdown(
            "A box is drawn from its own prompt, the rest from the picture’s. Drag a box, or its corner, or paint a form."
        )
        board = gr.HTML(_board(studio, ()), elem_id="region-board", js_on_load=markup.CLICKS + DRAGS + PAINTING)
        with gr.Row():
            suggest = gr.Button("From the prompt", size="sm", min_width=90, elem_id="suggest-regions")
            add = gr.Button("Add a box", size="sm", min_width=90)
            clear = gr.Button("Remove all", size="sm", min_width=90)
        confined = gr.Radio(
            list(ACTING),
            value=next(iter(ACTING)),
            label="Each concept acts",
            info="In its own box each is drawn by its own model, which takes longer and lets none disturb another; those trained "
            "in one go have learnt to share the picture.",
            elem_id="confined",
        )
    outputs = [regions, board]

    def shown(changed: actions.Regions | None, before: actions.Regions) -> tuple[actions.Regions, str]:
        now = before if changed is None else changed
        return now, _board(studio, now)

    def edit(before: actions.Regions, event: gr.EventData) -> Any:
        do, name, value = said(event)
        number = int(name) if name.isdigit() else -1
        if do == "region-box":
            return shown(attempt(actions.moved, before, number, value), before)
        if do == "paint-region" and 0 <= number < len(before):
            return before, _board(studio, before, number)
        if do == "keep-mask":
            return shown(attempt(lambda: actions.formed(before, number, painted(value))), before)
        if do == "no-mask":
            return shown(attempt(actions.boxed, before, number), before)
        if do == "close-mask":
            return shown(None, before)
        if do == "region-prompt":
            return shown(attempt(actions.named, before, number, value), before)
        if do == "remove-region":
            return shown(attempt(actions.removed, before, number), before)
        return gr.skip(), gr.skip()

    board.click(edit, regions, outputs, **PIECE)
    suggest.click(
        lambda before, name, words: shown(attempt(actions.suggested, studio, name, words), before),
        [regions, adapter, prompt],
        outputs,
        **EVENT,
    )
    add.click(lambda before, words: shown(attempt(actions.added, before, words), before), [regions, prompt], outputs, **EVENT)
    clear.click(lambda: shown((), ()), None, outputs, **EVENT)
    return regions, confined, (part, board)


def show_regions(studio: Studio, regions: actions.Regions) -> tuple[Any, str]:
    """Return the part, opened for regions and closed without, and what it shows."""
    return gr.update(open=bool(regions)), _board(studio, regions)


def _board(studio: Studio, regions: actions.Regions, painting: int | None = None) -> str:
    """Return the boxes over the latest picture, or the canvas of region `painting`, and a line of fields for each region."""
    if not regions:
        return markup.empty("No regions: the whole picture is drawn from the prompt.")
    latest = picture_cards(studio, count=1)
    picture = markup.image(latest[0].path, "the latest picture, under the regions") if latest else ""
    fields = "".join(_fields(region, number) for number, region in enumerate(regions))
    board = _boxes(picture, regions) if painting is None else _painter(picture, regions[painting], painting)
    return f'{board}<div class="sd-stack sd-regions">{fields}</div>'


def _boxes(picture: str, regions: actions.Regions) -> str:
    forms = "".join(
        f'<img class="sd-form" src="{coloured(region.mask)}" alt="form of region {number}">'
        for number, region in enumerate(regions, start=1)
        if region.mask is not None
    )
    boxes = "".join(_box(region, number) for number, region in enumerate(regions))
    return f'<div class="sd-canvas">{picture}{forms}{boxes}</div>'


def _painter(picture: str, region: Region, number: int) -> str:
    name, side = str(number), actions.FORM_SIDE
    buttons = markup.button("no-mask", name, "The whole box") + markup.button("close-mask", name, "Close", kind="sd-quiet")
    what = markup.muted(f"Paint where “{region.prompt}” shall be.")
    paper = canvas(picture or "<div></div>", (side, side), region.mask, f"form of region {number + 1}")
    return f'<div class="sd-painter sd-region-painter">{what}{paper}{brushes(name, "Keep the form", buttons)}</div>'


def _box(region: Region, number: int) -> str:
    left, top, right, bottom = region.box
    style = f"left:{left:.1%};top:{top:.1%};width:{right - left:.1%};height:{bottom - top:.1%}"
    name = f"Region {number + 1}, {region.prompt}: arrow keys move it, with Shift they resize it"
    what = f'data-name="{number}" data-edges="{_edges(region)}" tabindex="0" role="group" aria-label="{markup.text(name)}"'
    return (
        f'<div class="sd-box sd-c{number % _COLOURS}" style="{style}" {what}><span>{markup.text(region.prompt)}</span>'
        '<i class="sd-handle"></i></div>'
    )


def _fields(region: Region, number: int) -> str:
    prompt = f'data-do="region-prompt" data-name="{number}" aria-label="Prompt of region {number + 1}" maxlength="500"'
    box = f'data-do="region-box" data-name="{number}" aria-label="Left, top, right, bottom of region {number + 1}" maxlength="60"'
    paint = markup.button("paint-region", str(number), "✎", kind="sd-quiet", title=f"Paint the form of region {number + 1}")
    remove = markup.button("remove-region", str(number), "✕", kind="sd-quiet", title=f"Remove region {number + 1}")
    return (
        f'<div class="sd-row"><span class="sd-dot sd-c{number % _COLOURS}"></span>'
        f'<input class="sd-field sd-grow" {prompt} value="{markup.text(region.prompt)}">'
        f'<input class="sd-field sd-edges" {box} value="{_edges(region)}">{paint}{remove}</div>'
    )


def _edges(region: Region) -> str:
    return ",".join(f"{edge:.3g}" for edge in region.box)
