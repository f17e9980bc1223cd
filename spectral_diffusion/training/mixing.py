"""Pictures of two concepts side by side, made from the photos of each: what no photo shows and every prompt for both asks for.

Cut-Mix, as SVDiff has it (Han et al. 2023, arXiv 2303.11305, section 3.2): without such pictures a model that learnt two
concepts blends them when both are named.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from spectral_diffusion.base import Base
from spectral_diffusion.concept import Concept, Example
from spectral_diffusion.training.examples import Crop, EncodedExamples, encoded, mask_of

PICTURES = 48
"""Pictures of each concept beside another that are made."""
CAPTIONS = ("{} and {}", "{} and {}", "a photo of {} and {}", "a picture of {} and {}", "{} next to {}", "{} beside {}")
"""What they are called; the first named stands on the left."""
CLOSEST, FARTHEST = 1.1, 1.7
"""A half is so many times as wide as what stands in it."""


def mixed_examples(base: Base, concepts: Sequence[Concept], seed: int) -> list[EncodedExamples]:
    """Return for each of several concepts `PICTURES` pictures of it beside another of them, on either side."""
    return [_beside_others(base, concepts, number, np.random.default_rng([seed, 2, number])) for number in range(len(concepts))]


def _beside_others(base: Base, concepts: Sequence[Concept], own: int, rng: np.random.Generator) -> EncodedExamples:
    mixes = []
    for number in range(PICTURES):
        other = (own + 1 + number // 2 % (len(concepts) - 1)) % len(concepts)
        mixes.append(_mix(concepts, (own, other) if number % 2 else (other, own), own, base.resolution, rng))
    return encoded(base, mixes)


def _mix(concepts: Sequence[Concept], sides: tuple[int, int], own: int, side: int, rng: np.random.Generator) -> Crop:
    """Return a picture of the concepts with the numbers `sides`, left and right."""
    chosen = [concepts[number].examples[rng.integers(len(concepts[number].examples))] for number in sides]
    halves = [half(example, side, rng) for example in chosen]
    nothing = np.zeros((side, side // 2), np.uint8)
    masks = [mask for _, mask in halves]
    caption = CAPTIONS[rng.integers(len(CAPTIONS))].format(*(concepts[number].token for number in sides))
    return Crop(
        picture=Image.fromarray(np.concatenate([picture for picture, _ in halves], axis=1)),
        mask=Image.fromarray(np.concatenate(masks, axis=1)),
        place=Image.fromarray(
            np.concatenate([mask if number == own else nothing for number, mask in zip(sides, masks, strict=True)], axis=1)
        ),
        caption=caption,
    )


def half(example: Example, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a photo around its mask as half a picture, `(side, side // 2, 3)`, and the mask, `(side, side // 2)`.

    What lies beyond the photo's edges repeats them and counts as background.
    """
    photo, mask = example.photo.image, mask_of(example)
    box = mask.point(lambda value: 255 if value > 127 else 0).getbbox() or (0, 0, *photo.size)
    least = max(box[2] - box[0], (box[3] - box[1]) / 2)
    width = rng.uniform(CLOSEST, FARTHEST) * least
    spans, rims = [], []
    for start, end, limit, length, pixels in (
        (box[0], box[2], photo.width, width, side // 2),
        (box[1], box[3], photo.height, 2 * width, side),
    ):
        play = (length - (end - start)) / 2
        first = (start + end - length) / 2 + rng.uniform(-0.5, 0.5) * play
        inside = max(first, 0.0), min(first + length, float(limit))
        before = round((inside[0] - first) / length * pixels)
        shown = max(1, min(pixels - before, round((inside[1] - inside[0]) / length * pixels)))
        spans.append((*inside, shown))
        rims.append((before, pixels - before - shown))
    (left, right, columns), (top, bottom, rows) = spans
    picture, place = (
        np.asarray(image.resize((columns, rows), Image.Resampling.LANCZOS, box=(left, top, right, bottom)))
        for image in (photo.convert("RGB"), mask)
    )
    return np.pad(picture, (rims[1], rims[0], (0, 0)), mode="edge"), np.pad(place, (rims[1], rims[0]))
