"""Regions: parts of a picture with a prompt of their own, as plain values: nothing here needs the libraries that draw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from spectral_diffusion.concepts.photos import BLACK, read_photo
from spectral_diffusion.errors import InputError, PhotoError
from spectral_diffusion.picture_text import is_picture_text, picture_from_text, picture_text
from spectral_diffusion.prompts.tokens import name_by_class, tokens_in

SOFT_EDGE = 0.04
"""Width of the edge over which a region fades out, in fractions of the picture's side."""
LEAST_SIDE = 0.05
"""A region smaller than this fraction of the picture in either direction holds nothing that could be drawn."""
LEAST_SHARE = 0.1
"""A region with a painted mask must belong to itself at least this much somewhere."""
MOST_REGIONS = 16
"""More would be too small to draw in."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the picture that is drawn from its own prompt.

    Attributes:
        prompt: what stands there.
        box: `(left, top, right, bottom)` in fractions of the picture.
        negative_prompt: what shall not be there.
        mask: a painted form instead of the whole box, any size, white where the region is; it is laid over the picture.

    Raises:
        InputError: the prompt is empty or the box lies outside the picture, is inverted or too small; the box is named.
    """

    prompt: str
    box: Box = (0.0, 0.0, 1.0, 1.0)
    negative_prompt: str = ""
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        where = f"The region {','.join(f'{edge:g}' for edge in self.box)}"
        if not self.prompt.strip():
            raise InputError(f"{where} has no prompt; say what stands there.")
        if not all(0.0 <= edge <= 1.0 for edge in self.box):
            raise InputError(f"{where} leaves the picture; its edges are fractions from 0 to 1: left, top, right, bottom.")
        if right <= left or bottom <= top:
            raise InputError(f"{where} is empty; its edges are left, top, right, bottom, with left < right and top < bottom.")
        if min(right - left, bottom - top) < LEAST_SIDE:
            raise InputError(f"{where} is too small to draw in; make it at least {LEAST_SIDE:g} wide and high.")
        if self.mask is not None and extent(self, 64, 64).max() < LEAST_SHARE:
            raise InputError(f"{where} has a mask with next to nothing white in it; paint a larger part of the box.")


def parse_region(text: str) -> Region:
    """Return the region that `LEFT,TOP,RIGHT,BOTTOM=PROMPT` describes, such as `0.05,0.2,0.45,0.95=<V1>`.

    Raises:
        InputError: it is not of that form, or the region is not possible.
    """
    edges, equals, prompt = text.partition("=")
    box = parse_box(edges)
    if not equals:
        raise InputError(f"The region '{text}' has no prompt; write it after a '=', as in 0.05,0.2,0.45,0.95=<V1>.")
    return Region(prompt=prompt.strip(), box=box)


def parse_box(text: str) -> Box:
    """Return the box that `LEFT,TOP,RIGHT,BOTTOM` describes; `Region` says whether it lies in the picture.

    Raises:
        InputError: these are not four numbers.
    """
    try:
        left, top, right, bottom = (float(edge) for edge in text.split(","))
    except ValueError as error:
        raise InputError(f"The box '{text}' is not of the form 0.05,0.2,0.45,0.95 (left, top, right, bottom).") from error
    return left, top, right, bottom


def read_regions(file: Path) -> tuple[Region, ...]:
    """Return the regions in a JSON file: a list of `{"prompt": ..., "box": [left, top, right, bottom]}`, lowest first.

    `negative_prompt` and `mask` may stand there too, the latter a path beside the file or the form itself, see `region_record`.

    Raises:
        InputError: the file cannot be read, or an entry is not a region; it is named by its number.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))  # Windows' editors put a mark before the text
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"The regions in '{file}' cannot be read ({error}); give a JSON file with a list of regions.") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f'\'{file}\' holds no list of regions; write [{{"prompt": "<V1>", "box": [0, 0, 0.5, 1]}}].')
    return tuple(_entry(entry, number, file) for number, entry in enumerate(entries, start=1))


def _entry(entry: dict[str, Any], number: int, file: Path) -> Region:
    unknown = entry.keys() - {"prompt", "box", "negative_prompt", "mask"}
    if unknown:
        raise InputError(f"Region {number} of '{file}' has a field '{min(unknown)}', which no region has; remove it.")
    try:
        return region_from_record(entry, file.parent)
    except PhotoError as error:
        raise InputError(f"The mask of region {number} in '{file}' cannot be read. {error}") from error
    except (KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        raise InputError(f"Region {number} of '{file}' is not complete ({error}); it needs a prompt and a box.") from error


def region_record(region: Region) -> dict[str, Any]:
    """Return `region` as JSON holds it, its painted form inside it: what `region_from_record` reads."""
    record: dict[str, Any] = {"prompt": region.prompt, "box": list(region.box), "negative_prompt": region.negative_prompt}
    if region.mask is not None:
        record["mask"] = picture_text(region.mask.convert("L"))
    return record


def region_from_record(record: dict[str, Any], folder: Path | None = None) -> Region:
    """Return the region that `record` describes.

    Args:
        folder: where a mask lies that is given by its path; only one inside the record is read without.

    Raises:
        InputError: the region is not possible, or its mask cannot be read.
        KeyError, TypeError, ValueError, OSError, SyntaxError: the record is not one of a region, or its mask no picture.
    """
    left, top, right, bottom = (float(edge) for edge in record.get("box", (0, 0, 1, 1)))
    mask = record.get("mask")
    return Region(
        prompt=str(record["prompt"]),
        box=(left, top, right, bottom),
        negative_prompt=str(record.get("negative_prompt", "")),
        mask=None if mask is None else _read_mask(str(mask), folder),
    )


def _read_mask(written: str, folder: Path | None) -> Image.Image:
    if is_picture_text(written):
        return picture_from_text(written).convert("L")
    if folder is None:
        raise ValueError("its mask is no PNG")
    return read_photo(folder / written, background=BLACK, least=1).image.convert("L")


def suggest_regions(prompt: str, class_words: Mapping[str, str]) -> tuple[Region, ...]:
    """Return columns of equal width, one for each token that `prompt` names, in the order in which it names them.

    Each column's prompt is the whole one with class words in place of the other tokens: `<V1> and <V2> near a lake` gives
    `<V1> and a cat near a lake` and `a dog and <V2> near a lake`. So every column is drawn as a part of the same scene of as many
    things; one that is told of a single thing puts it in the middle of the picture, and two columns draw one thing of two halves.

    Args:
        class_words: token to class word.
    """
    named = tokens_in(prompt, class_words)
    edges = [number / len(named) for number in range(len(named))] + [1.0]
    return tuple(
        Region(prompt=name_by_class(prompt, {**class_words, own: own}), box=(left, 0.0, right, 1.0))
        for own, left, right in zip(named, edges[:-1], edges[1:], strict=True)
    )


def extent(region: Region, width: int, height: int) -> np.ndarray:
    """Return `(height, width)` shares in [0, 1], float32: how far each position lies in `region`, its edges fading out."""
    left, top, right, bottom = region.box
    box = _fading(left, right, width)[None, :] * _fading(top, bottom, height)[:, None]
    if region.mask is None:
        return box
    soft = region.mask.convert("L").resize((width, height), Image.Resampling.BILINEAR)
    soft = soft.filter(ImageFilter.GaussianBlur(SOFT_EDGE / 2 * max(width, height)))
    return box * np.asarray(soft, dtype=np.float32) / 255


def _fading(start: float, stop: float, count: int) -> np.ndarray:
    """Return `(count,)`: 1 between `start` and `stop`, fading to 0 at these edges except where they are the picture's."""
    centres = (np.arange(count, dtype=np.float32) + 0.5) / count
    rise = np.ones_like(centres) if start <= 0.0 else ((centres - start) / SOFT_EDGE).clip(0, 1)
    fall = np.ones_like(centres) if stop >= 1.0 else ((stop - centres) / SOFT_EDGE).clip(0, 1)
    return rise * fall
