"""Regions of a drawing, changed one step at a time; later ones lie on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from app.actions.adapters import library_class_words
from app.actions.studio import Studio
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.regions import LEAST_SIDE, MOST_REGIONS, SOFT_EDGE, Box, Region, parse_box, suggest_regions

Regions = tuple[Region, ...]
NEW_BOX = (0.25, 0.25, 0.75, 0.75)
"""Where a region begins."""
FORM_SIDE = 256
"""Side of the canvas on which a region's form is painted, in pixels."""


def suggested(studio: Studio, adapter: str | None, prompt: str) -> Regions:
    """Return a column for each token of the adapter called `adapter` that `prompt` names.

    Raises:
        InputError: there is no adapter, or the prompt names none of its tokens.
    """
    class_words = library_class_words(studio, adapter) if adapter else {}
    regions = suggest_regions(prompt, class_words)
    if not regions:
        which = f"one of {', '.join(class_words)}" if class_words else "a token, after choosing an adapter"
        raise InputError(f"The prompt names no concept to make room for; write {which} into it.")
    return regions


def added(regions: Sequence[Region], prompt: str) -> Regions:
    """Return `regions` and one more in the middle, with the drawing's own prompt until it is named.

    Raises:
        InputError: there are too many.
    """
    if len(regions) >= MOST_REGIONS:
        raise InputError(f"At most {MOST_REGIONS} regions fit into one picture; remove one first.")
    return (*regions, Region(prompt=prompt.strip() or "a thing", box=NEW_BOX))


def moved(regions: Sequence[Region], number: int, edges: str) -> Regions:
    """Return `regions` with region `number` in the box `edges`, written `left,top,right,bottom`; its form goes with it.

    Raises:
        InputError: that is no box in the picture.
    """
    region = _one(regions, number)
    placed = replace(region, box=parse_box(edges), mask=None)
    if region.mask is not None:
        placed = replace(placed, mask=_carried(region.mask, region.box, placed.box))
    return _with(regions, number, placed)


def formed(regions: Sequence[Region], number: int, form: Image.Image) -> Regions:
    """Return `regions` with region `number` in the painted `form`, white where it is, and in a box around it.

    Raises:
        InputError: next to nothing was painted.
    """
    region, bright = _one(regions, number), form.point(lambda value: 255 if value > 127 else 0).getbbox()
    if bright is None:
        raise InputError(
            f"Nothing was painted for the region of '{region.prompt}'; paint where it shall be, or close the canvas."
        )
    edges = [edge / form.size[index % 2] for index, edge in enumerate(bright)]
    # the box fades out over its edge, so it leaves that much room, and the least that a box may be
    room = [max(SOFT_EDGE, (LEAST_SIDE - edges[index + 2] + edges[index]) / 2) for index in range(2)]
    box = (*(max(0.0, edges[i] - room[i]) for i in range(2)), *(min(1.0, edges[i + 2] + room[i]) for i in range(2)))
    return _with(regions, number, replace(region, box=box, mask=form))


def boxed(regions: Sequence[Region], number: int) -> Regions:
    """Return `regions` with region `number` filling its box again."""
    return _with(regions, number, replace(_one(regions, number), mask=None))


def named(regions: Sequence[Region], number: int, prompt: str) -> Regions:
    """Return `regions` with region `number` drawn from `prompt`.

    Raises:
        InputError: the prompt is empty.
    """
    return _with(regions, number, replace(_one(regions, number), prompt=prompt.strip()))


def removed(regions: Sequence[Region], number: int) -> Regions:
    """Return `regions` without region `number`."""
    _one(regions, number)
    return (*regions[:number], *regions[number + 1 :])


def _carried(form: Image.Image, before: Box, after: Box) -> Image.Image:
    """Return `form` with what lay in one box moved into the other."""
    source, target = ([round(edge * form.size[index % 2]) for index, edge in enumerate(box)] for box in (before, after))
    size = (max(1, target[2] - target[0]), max(1, target[3] - target[1]))
    moved = Image.new("L", form.size, 0)
    moved.paste(form.crop(source).resize(size, Image.Resampling.BILINEAR), target[:2])
    return moved


def _one(regions: Sequence[Region], number: int) -> Region:
    if not 0 <= number < len(regions):
        raise InputError(f"There is no region {number + 1}; reload the page.")
    return regions[number]


def _with(regions: Sequence[Region], number: int, region: Region) -> Regions:
    return (*regions[:number], region, *regions[number + 1 :])
