"""Regions of a drawing, changed one step at a time; later ones lie on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from app.actions.adapters import library_tokens
from app.actions.studio import Studio
from spectral_diffusion.errors import InputError
from spectral_diffusion.regions import MOST_REGIONS, Region, parse_box, suggest_regions

Regions = tuple[Region, ...]
NEW_BOX = (0.25, 0.25, 0.75, 0.75)
"""Where a region begins."""


def suggested(studio: Studio, adapter: str | None, prompt: str) -> Regions:
    """Return a column for each token of the adapter called `adapter` that `prompt` names.

    Raises:
        InputError: there is no adapter, or the prompt names none of its tokens.
    """
    tokens = library_tokens(studio, adapter) if adapter else []
    regions = suggest_regions(prompt, tokens)
    if not regions:
        which = f"one of {', '.join(tokens)}" if tokens else "a token, after choosing an adapter"
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
    """Return `regions` with region `number` in the box `edges`, written `left,top,right,bottom`.

    Raises:
        InputError: that is no box in the picture.
    """
    return _with(regions, number, replace(_one(regions, number), box=parse_box(edges)))


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


def _one(regions: Sequence[Region], number: int) -> Region:
    if not 0 <= number < len(regions):
        raise InputError(f"There is no region {number + 1}; reload the page.")
    return regions[number]


def _with(regions: Sequence[Region], number: int, region: Region) -> Regions:
    return (*regions[:number], region, *regions[number + 1 :])
