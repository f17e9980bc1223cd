"""The tab Concepts: the library, a new concept, one concept's photos, and its training."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from app.actions import concepts as library
from app.actions import photos as photo_library
from app.actions.adapters import adapter_cards
from app.actions.pictures import likeness_of
from app.actions.studio import Studio, concept_names
from app.actions.tour import queue_tour
from app.actions.trainings import (
    changes_from,
    expectations,
    further_settings,
    train,
    train_again,
    training_view,
    unknown_base,
)
from app.jobs import State
from app.ui import markup
from app.ui.activity import wire_jobs
from app.ui.charts import loss_curve
from app.ui.fold import folded
from app.ui.live import EVENT, PIECE, SLOW, Live, attempt, said
from app.ui.painter import PAINTING, painted, painter
from spectral_diffusion.errors import InputError, StorageError
from spectral_diffusion.files import files_in
from spectral_diffusion.training import PRESETS

_PHOTO_TYPES = ["image", ".heic", ".heif", ".avif", ".tif", ".tiff", ".txt"]
_TOKEN = "<dog>"


def build_concepts(studio: Studio, live: Live) -> None:
    """Build the tab."""
    chosen = live.begin(gr.State(None), lambda: _first_choice(studio))
    welcome = live.add(gr.HTML(js_on_load=markup.CLICKS), lambda: _welcome(studio))
    cards = live.add(gr.HTML(elem_id="concept-cards", js_on_load=markup.CLICKS), lambda name: _cards(studio, name), chosen)
    findings, photo_version = gr.HTML(elem_id="findings"), gr.State(0)
    with folded("New concept", elem_id="new-concept"):
        gr.Markdown(
            "Five or six photos on differing backgrounds are enough. Phone photos, HEIC included, can be dropped as they are, "
            "and with `1.jpg` its mask `1-mask.png` and its caption `1.txt`."
        )
        with gr.Row():
            class_word = gr.Textbox(
                "", label="What is it?", placeholder="dog", info="A word or two that the base knows.", max_length=60
            )
            token = gr.Textbox(
                "", label="Its token", placeholder=_TOKEN, info="The word that will call it in prompts.", max_length=64
            )
        uploads = gr.File(label="Photos", file_count="multiple", file_types=_PHOTO_TYPES, height=150, elem_id="new-photos")
        create = gr.Button("Add the concept", variant="primary")
    live.add(gr.HTML(elem_id="concept-title"), lambda name: _title(studio, name), chosen)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            paper = gr.HTML("", elem_id="painter", js_on_load=markup.CLICKS + PAINTING)
            photos = live.add(
                gr.HTML(elem_id="photos", js_on_load=markup.CLICKS), lambda name, _: _photos(studio, name), chosen, photo_version
            )
            with gr.Row():
                more = gr.UploadButton("Add photos", file_count="multiple", file_types=_PHOTO_TYPES, size="sm")
                masks = gr.Button("Make masks", size="sm", elem_id="make-masks")
        with gr.Column(scale=2, min_width=300):
            _build_training(studio, live, chosen)
    _wire_photos(studio, chosen, photos, paper, photo_version)

    def open_concept(event: gr.EventData) -> tuple[str, str, str]:
        _, target, _ = said(event)
        return target, "", ""

    def remove_concept(event: gr.EventData) -> tuple[Any, ...]:
        do, target, _ = said(event)
        if do != "remove-concept":
            return gr.skip(), gr.skip()
        attempt(library.remove_concept, studio, target, done="It lies among the removed ones.")
        return (gr.skip(), gr.skip()) if target in concept_names(studio) else (_first_choice(studio), "")

    def add(word: str, wanted: str, files: list[str] | None) -> tuple[Any, ...]:
        name = attempt(_create, studio, word, wanted, [Path(file) for file in files or ()])
        if name is None:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()
        concept, found = name
        return concept, _findings(found), "", "", None

    def add_more(name: str, files: list[str] | None, version: int) -> tuple[Any, ...]:
        found = attempt(photo_library.add_photos, studio, name, [Path(file) for file in files or ()])
        return (gr.skip(), version) if found is None else (_findings(found), version + 1)

    def make_masks(name: str | None, version: int) -> int:
        words = attempt(photo_library.suggest_masks, studio, name or "")
        if words is not None:
            gr.Info(words, duration=8, title="Masks")
        return version + 1

    welcome.click(
        lambda: attempt(queue_tour, studio, done="The tour is queued: a training, then fusing, drawing, exporting."), **EVENT
    )
    cards.click(open_concept, None, [chosen, paper, findings], **PIECE)
    photos.click(remove_concept, None, [chosen, paper], **PIECE)
    class_word.blur(
        lambda word: gr.update(placeholder=library.suggest_token(studio, word) if word.strip() else _TOKEN),  # taken when empty
        class_word,
        token,
        **EVENT,
    )
    create.click(add, [class_word, token, uploads], [chosen, findings, class_word, token, uploads], **SLOW)
    masks.click(make_masks, [chosen, photo_version], photo_version, **SLOW)
    more.upload(add_more, [chosen, more, photo_version], [findings, photo_version], **SLOW)


def _build_training(studio: Studio, live: Live, chosen: gr.State) -> None:
    preset = gr.Radio(list(PRESETS), value=PRESETS[0], label="How long to train", elem_id="preset")
    live.add(gr.HTML(), lambda: _expected(studio))
    beside = live.offer(
        gr.CheckboxGroup(
            [],
            label="In one go",
            info="Choose all that will stand in one picture: trained together, each learns to stay itself beside the others.",
            elem_id="beside",
        ),
        lambda: _trainable(studio),
    )
    with folded("More settings", elem_id="more-settings"):
        apart = live.offer(
            gr.CheckboxGroup(
                [],
                label="Never drawn with",
                info="All that are trained take part while this one learns to stand beside them, and keep their bands; "
                "those chosen here do not.",
                elem_id="apart",
            ),
            lambda: [(card.label, card.name) for card in adapter_cards(studio, ["adapters"])],
        )
        steps = gr.Number(0, label="Steps", info="0: what the preset says. More steps, more likeness.", minimum=0, precision=0)
        sample_every = gr.Number(label="Sample pictures every … steps", info="0 draws none.", value=50, minimum=0, precision=0)
    with folded("Every setting"):
        gr.Markdown("What is left empty is as the preset says.")
        with gr.Row():
            further = {name: _further(name, help) for name, help in further_settings().items()}
    start = gr.Button("Train", variant="primary", elem_id="train")
    training = live.add(gr.HTML(elem_id="training", js_on_load=markup.CLICKS), lambda name: _training(studio, name), chosen)
    wire_jobs(studio, training)

    def begin(
        name: str | None, how: str, others: list[str], never: list[str], count: float | None, every: float | None, *texts: str
    ) -> None:
        changes = attempt(changes_from, dict(zip(further, texts, strict=True)))
        if changes is not None:
            changes |= ({"steps": int(count)} if count else {}) | {"sample_every": int(every or 0)}
            done = "The training is queued."
            attempt(train, studio, name or "", how, changes, beside=others, apart_from=never, done=done)

    def go_longer(event: gr.EventData) -> None:
        do, name, _ = said(event)
        if do == "longer":
            attempt(train_again, studio, name, longer=True, done="It will be trained on; the adapter stays until that is done.")

    start.click(begin, [chosen, preset, beside, apart, steps, sample_every, *further.values()], **EVENT)
    training.click(go_longer, **PIECE)


def _further(name: str, help: str) -> gr.Textbox:
    label, info = name.replace("_", " ").capitalize().replace("Unet", "UNet"), f"{help[0].upper()}{help[1:]}."
    return gr.Textbox("", label=label, info=info, max_lines=1, min_width=150)


def _wire_photos(studio: Studio, chosen: gr.State, photos: gr.HTML, paper: gr.HTML, version: gr.State) -> None:
    def act(name: str, now: int, event: gr.EventData) -> tuple[Any, ...]:
        do, target, value = said(event)
        if do == "edit":
            return now, _paper(studio, name, target, attempt(photo_library.mask_of, studio, name, target))
        if do == "caption":
            attempt(photo_library.set_caption, studio, name, target, value, done="Caption kept.")
        elif do == "remove-photo":
            attempt(photo_library.remove_photo, studio, name, target)
        else:
            return gr.skip(), gr.skip()
        return now + 1, "" if do == "remove-photo" else gr.skip()

    def paint(name: str, now: int, event: gr.EventData) -> tuple[Any, ...]:
        do, target, value = said(event)
        if do == "suggest-mask":
            words = "Correct it by painting, then keep it."
            return now, _paper(studio, name, target, attempt(photo_library.suggested_mask_of, studio, name, target, done=words))
        if do == "close-mask":
            return now, ""
        if do not in ("keep-mask", "no-mask"):
            return gr.skip(), gr.skip()
        mask = attempt(painted, value) if do == "keep-mask" else None
        if do == "keep-mask" and mask is None:
            return gr.skip(), gr.skip()
        done = "Mask kept." if mask is not None else "The whole photo counts."
        attempt(photo_library.set_mask, studio, name, target, mask, done=done)
        return now + 1, ""

    photos.click(act, [chosen, version], [version, paper], **PIECE)
    paper.click(paint, [chosen, version], [version, paper], **PIECE)


def _paper(studio: Studio, name: str, photo: str, shown: tuple[Image.Image, Image.Image | None] | None) -> Any:
    return gr.skip() if shown is None else painter(studio, name, photo, *shown)


def _create(studio: Studio, word: str, token: str, files: list[Path]) -> tuple[str, list[photo_library.Finding]]:
    photo_library.check_count(files)
    name = library.create_concept(studio, token.strip() or library.suggest_token(studio, word), word)
    try:
        return name, photo_library.add_photos(studio, name, files)
    except StorageError:
        library.remove_concept(studio, name)
        raise


def _first_choice(studio: Studio) -> str | None:
    """Return the concept that is being trained, or the first one."""
    running = (job for job in studio.jobs.jobs() if job.state is State.RUNNING)
    names = concept_names(studio)
    trained = (name for job in running for name in library.trained_by(job) if name in names)
    return next(trained, None) or next(iter(names), None)


def _welcome(studio: Studio) -> str:
    fresh = not files_in(studio.folder("fused"), ".safetensors") and not any(
        job.kind in ("train", "fuse") for job in studio.jobs.jobs()
    )
    if not fresh or library.SAMPLES[0] not in concept_names(studio):
        return ""
    words = "Three sample concepts are ready. The tour trains two, fuses them, draws both in one picture and exports the file."
    return (
        f'<div class="sd-welcome"><p><strong>First time here?</strong> {words}</p>'
        f"{markup.button('tour', '', 'Run the whole tour', kind='sd-primary')}</div>"
    )


def _cards(studio: Studio, chosen: str | None) -> str:
    cards = library.concept_cards(studio)
    if not cards:
        return markup.empty("No concepts yet. Open “New concept” below and drop a few photos.")
    likeness = likeness_of(studio, [card.token for card in cards])
    shown = (_card(card, likeness.get(card.token), chosen=card.name == chosen) for card in cards)
    return f'<div class="sd-cards">{"".join(shown)}</div>'


def _card(card: library.ConceptCard, likeness: tuple[float, int] | None, *, chosen: bool) -> str:
    cover = (
        markup.image(card.photos[0].thumbnail, f"a photo of {card.token}")
        if card.photos
        else '<div class="sd-blank">no photos</div>'
    )
    active = card.job is not None and card.job.state is not State.DONE
    state = markup.state_badge(card.job.state) if active and card.job else ""
    if card.adapter is not None:
        band = f"band {card.job.result['bands'][card.name]}" if card.job is not None and card.job.result else "trained"
        state = markup.badge(band, "sd-done") + state
    count = f"{len(card.photos)} photo{'s' if len(card.photos) != 1 else ''}"
    state = state or markup.badge("not trained")
    about = f'<span class="sd-muted">{markup.text(card.class_word)}, {count}</span>'
    if card.problem:
        about, state = f'<span class="sd-reason">{markup.text(card.problem)}</span>', ""
    score = "" if likeness is None else f'<span class="sd-muted">likeness {likeness[0]:.2f} over {_pictures(likeness[1])}</span>'
    opens = f'data-do="open" data-name="{markup.text(card.name)}" aria-pressed="{"true" if chosen else "false"}"'
    return (
        f'<button type="button" class="sd-card {"sd-chosen" if chosen else ""}" {opens}>{cover}<span class="sd-body">'
        f"<strong>{markup.text(card.token)}</strong>{about}"
        f'{score}<span class="sd-row">{state}</span></span></button>'
    )


def _pictures(count: int) -> str:
    return f"{count} picture{'s' if count != 1 else ''}"


def _title(studio: Studio, name: str | None) -> str:
    card = _card_of(studio, name)
    if card is None:
        return ""
    class_word = f'<span class="sd-muted">a {markup.text(card.class_word)}</span>'
    return f'<h2 class="sd-section"><code>{markup.text(card.token)}</code> {class_word}</h2>'


def _card_of(studio: Studio, name: str | None) -> library.ConceptCard | None:
    if name not in concept_names(studio):
        return None
    with suppress(InputError):  # the list of concepts says it
        return library.concept_card(studio, name)


def _photos(studio: Studio, name: str | None) -> str:
    card = _card_of(studio, name)
    if card is None:
        return markup.empty("Choose a concept above to see its photos.")
    remove = markup.button(
        "remove-concept",
        card.name,
        "Remove concept",
        kind="sd-quiet",
        confirm=f"Remove {card.token} with its photos and its adapter?",
    )
    if not card.photos:
        return markup.empty("No photos yet. Add five or six of it, on differing backgrounds.") + remove
    return f'<div class="sd-cards sd-photos">{"".join(map(_photo, card.photos))}</div><div class="sd-row sd-end">{remove}</div>'


def _photo(photo: photo_library.PhotoCard) -> str:
    name = markup.text(photo.name)
    mask = markup.image(photo.mask, f"mask of {photo.name}", kind="sd-inset") if photo.mask else ""
    picture = f'<div class="sd-photo">{markup.image(photo.thumbnail, f"{photo.name}: {photo.caption}")}{mask}</div>'
    caption = f'data-do="caption" data-name="{name}" aria-label="Caption of {name}" value="{markup.text(photo.caption)}"'
    edit = markup.button("edit", photo.name, "Mask ✓" if photo.mask else "Mask", title=f"Mask and crops of {photo.name}")
    remove = markup.button("remove-photo", photo.name, "✕", kind="sd-quiet", title=f"Remove {photo.name}")
    problem = markup.refusal(photo.problem) if photo.problem else ""
    return (
        f'<div class="sd-card">{picture}<div class="sd-body">{problem}<input class="sd-field" {caption} maxlength="300">'
        f'<div class="sd-tools">{edit}{remove}</div></div></div>'
    )


def _findings(found: list[photo_library.Finding]) -> str:
    if not found:
        return ""
    items = "".join(
        f'<li class="{"sd-yes" if one.used else "sd-no"}"><strong>{markup.text(one.name)}</strong> {markup.text(one.text)}</li>'
        for one in found
    )
    used = sum(finding.used for finding in found)
    return f'{markup.muted(f"{used} of {len(found)} files are used.")}<ul class="sd-findings">{items}</ul>'


def _expected(studio: Studio) -> str:
    expected = expectations(studio)
    if not expected:
        return markup.muted(unknown_base(studio))
    lines = [
        f"<strong>{name}</strong> {one.steps} steps, about {markup.duration(one.seconds)}, {one.memory / 1e9:.1f} GB"
        for name, one in expected.items()
    ]
    return f'<ul class="sd-expected sd-muted">{"".join(f"<li>{line}</li>" for line in lines)}</ul>'


def _trainable(studio: Studio) -> Any:
    """Return the choices of what is trained in one go; none while there is one concept only."""
    cards = [card for card in library.concept_cards(studio) if card.photos]
    return [(card.token, card.name) for card in cards] if len(cards) > 1 else []


def _training(studio: Studio, name: str | None) -> str:
    card = _card_of(studio, name)
    if card is None or card.job is None:
        return markup.empty("Not trained yet. Choose how long, then Train.")
    job, view = card.job, training_view(studio, card.job, card.name)
    parts = [f'<div class="sd-row">{markup.state_badge(job.state)} {markup.job_buttons(job, studio.jobs.waiting())}</div>']
    if job.state is State.RUNNING and view.steps:
        parts.append(markup.bar(view.step, view.steps, job.title))
        speed = f"step {view.step} of {view.steps}, {view.speed:.1f} steps per second, {markup.duration(view.remaining)} left"
        parts.append(markup.muted(speed))
    elif job.state is State.DONE:
        steps, seconds, bands = (job.result[key] for key in ("steps", "seconds", "bands"))
        longer = markup.button("longer", card.name, f"Train longer ({steps} more steps)")
        made = f"{steps} more steps" if job.arguments["longer"] else f"{steps} steps"
        parts.append(markup.muted(f"{made} in {markup.duration(seconds)}, directions {bands[card.name]}."))
        parts.append(f'<div class="sd-row">{longer}</div>')
    elif view.step and job.state in (State.CANCELLED, State.INTERRUPTED):
        parts.append(markup.muted(f"Stopped after step {view.step} of {view.steps}; what was learnt is kept."))
    if job.reason:
        parts.append(markup.refusal(job.reason))
    if view.steps:
        parts.append(loss_curve(view.losses, view.steps))
    if view.samples:
        parts.append(f'<div class="sd-strip">{"".join(map(_sample, view.samples))}</div>')
    return f'<div class="sd-stack">{"".join(parts)}</div>'


def _sample(path: Path) -> str:
    step = int(path.stem.split("-")[1])
    return f"<figure>{markup.image(path, f'sample after step {step}')}<figcaption>step {step}</figcaption></figure>"
