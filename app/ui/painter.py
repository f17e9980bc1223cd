"""A mask painted over a picture: where the concept is in a photo, or what form a region has."""

from __future__ import annotations

import io

from PIL import Image

from app.actions import photos as library
from app.actions.studio import Studio
from app.actions.trainings import base_facts
from app.ui import markup
from spectral_diffusion.errors import InputError, SpectralDiffusionError
from spectral_diffusion.picture_text import picture_from_text, picture_text

_COLOUR = (255, 40, 110)
PAINTING = """
let stroke = null;
const start = () => {
  const canvas = element.querySelector('canvas:not([data-ready])');
  if (!canvas) return;
  canvas.dataset.ready = 'yes';
  const mask = new Image();
  mask.onload = () => canvas.getContext('2d').drawImage(mask, 0, 0, canvas.width, canvas.height);
  if (canvas.dataset.mask) mask.src = canvas.dataset.mask;
  canvas.scrollIntoView({block: 'nearest'});
};
new MutationObserver(start).observe(element, {childList: true, subtree: true});
start();
const point = (canvas, event) => {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale, scale];
};
const paint = (event) => {
  const canvas = stroke.canvas, context = canvas.getContext('2d'), [x, y, scale] = point(canvas, event);
  const erase = element.querySelector('[name=brush][value=erase]').checked;
  context.globalCompositeOperation = erase ? 'destination-out' : 'source-over';
  context.strokeStyle = canvas.dataset.colour;
  context.lineWidth = element.querySelector('[name=size]').value * scale;
  context.lineCap = context.lineJoin = 'round';
  context.beginPath();
  context.moveTo(...stroke.last);
  context.lineTo(x, y);
  context.stroke();
  stroke.last = [x, y];
};
element.addEventListener('pointerdown', (event) => {
  if (event.target.tagName !== 'CANVAS') return;
  const [x, y] = point(event.target, event);
  stroke = {canvas: event.target, last: [x, y]};
  event.target.setPointerCapture(event.pointerId);
  paint(event);
});
element.addEventListener('pointermove', (event) => stroke && paint(event));
for (const end of ['pointerup', 'pointercancel']) element.addEventListener(end, () => { stroke = null; });
element.addEventListener('click', (event) => {
  const keep = event.target.closest('[data-keep]');
  if (!keep) return;
  const value = element.querySelector('canvas').toDataURL('image/png');
  trigger('click', {do: 'keep-mask', name: keep.dataset.keep, value});
});
"""
"""JavaScript of the painter: a brush and an eraser on a canvas over the photo; the canvas is sent when it is kept."""


def painter(studio: Studio, name: str, photo: str, picture: Image.Image, mask: Image.Image | None) -> str:
    """Return the painter for a photo of the concept called `name`; `mask` is what it begins with."""
    shown = markup.text(photo)
    buttons = (
        markup.button("suggest-mask", photo, "Suggest one")
        + markup.button("no-mask", photo, "No mask")
        + markup.button("close-mask", photo, "Close", kind="sd-quiet")
    )
    what = f"Paint where the concept is in {photo}; the training then looks there."
    photo_below = f'<img src="{_inline(picture)}" alt="{shown}">'
    paper = canvas(photo_below, picture.size, mask, f"mask of {shown}")
    tools = brushes(photo, "Keep the mask", buttons)
    return f'<div class="sd-painter">{markup.muted(what)}{paper}{tools}{_crops(studio, name, photo)}</div>'


def canvas(below: str, size: tuple[int, int], mask: Image.Image | None, label: str) -> str:
    """Return a canvas of `size` pixels over the picture `below`; `mask` is what it begins with, `label` what is read out."""
    begun = coloured(mask) if mask else ""
    inks = f'data-colour="rgb{_COLOUR}" data-mask="{begun}"'
    over = f'<canvas width="{size[0]}" height="{size[1]}" role="img" aria-label="{label}" {inks}></canvas>'
    return f'<div class="sd-paper">{below}{over}</div>'


def brushes(name: str, keep: str, buttons: str) -> str:
    """Return brush and eraser, and beside `buttons` the one that says `keep` and sends what was painted for `name`."""
    kinds = "".join(
        f'<label><input type="radio" name="brush" value="{kind}"{" checked" if kind == "paint" else ""}> {label}</label>'
        for kind, label in (("paint", "Paint"), ("erase", "Erase"))
    )
    size = '<label>Brush <input type="range" name="size" min="4" max="80" value="28"></label>'
    kept = f'<button type="button" class="sd-button sd-primary" data-keep="{markup.text(name)}">{keep}</button>'
    return f'<div class="sd-row">{kinds}{size}</div><div class="sd-row">{kept}{buttons}</div>'


def painted(sent: str) -> Image.Image:
    """Return the mask that the page sent: white where something was painted.

    Raises:
        InputError: it is no PNG of bounded size.
    """
    try:
        return picture_from_text(sent, library.MASK_SIDE).convert("RGBA").getchannel("A")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"The painted mask did not arrive whole ({error}); keep it again.") from error


def _crops(studio: Studio, name: str, photo: str) -> str:
    facts = base_facts(studio)
    try:
        crops = library.crop_previews(studio, name, photo, (facts or {"resolution": 512})["resolution"])
    except SpectralDiffusionError:
        return ""
    pictures = "".join(f'<img src="{_inline(crop)}" alt="crop {number}">' for number, crop in enumerate(crops, start=1))
    return f'{markup.muted("As the training sees it, cropped at random:")}<div class="sd-strip" id="crops">{pictures}</div>'


def coloured(mask: Image.Image) -> str:
    """Return the address of a picture with the paint where `mask` is white."""
    layer = Image.new("RGBA", mask.size, (*_COLOUR, 0))
    layer.putalpha(mask.convert("L"))
    return picture_text(layer)


def _inline(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=88)
    return markup.webp_address(content.getvalue())
