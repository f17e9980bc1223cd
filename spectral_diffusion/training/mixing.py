"""Pictures of two or three concepts side by side, made from the photos of each: what no photo shows and every prompt of several
asks for.

Cut-Mix, which SVDiff has with two (Han et al. 2023, arXiv 2303.11305, section 3.2): without such pictures a model that learnt two
concepts blends them when both are named. All stand alike in their strips, since from noise a base cannot tell where or how large
a thing is to be, and what stands anywhere is learnt as the mean of it all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from spectral_diffusion.bases.base import Base
from spectral_diffusion.concepts.concept import Concept, Example
from spectral_diffusion.training.examples import Crop, EncodedExamples, box_of, encoded, mask_of
from spectral_diffusion.training.scenes import GROUND

PICTURES = 48
"""Pictures of each concept beside others that are made."""
CAPTIONS = {
    2: ("{} and {}", "{} and {}", "a photo of {} and {}", "a picture of {} and {}", "{} next to {}", "{} beside {}"),
    3: ("{}, {} and {}", "{}, {} and {}", "a photo of {}, {} and {}", "a picture of {}, {} and {}"),
}
"""What they are called, by how many there are; who is named first stands on the left."""
CLOSEST, FARTHEST = 1.12, 1.2
"""A strip is so many times as wide as what stands in it."""


def mixed_examples(base: Base, concepts: Sequence[Concept], seed: int) -> list[EncodedExamples]:
    """Return for each of several concepts `PICTURES` pictures of it beside one or two of the others, in any order."""
    return [_beside_others(base, concepts, number, np.random.default_rng([seed, 2, number])) for number in range(len(concepts))]


def _beside_others(base: Base, concepts: Sequence[Concept], own: int, rng: np.random.Generator) -> EncodedExamples:
    counts = [count for count in CAPTIONS if count <= len(concepts)]
    others = [number for number in range(len(concepts)) if number != own]
    mixes = []
    for number in range(PICTURES):
        beside = rng.choice(others, counts[number % len(counts)] - 1, replace=False)
        mixes.append(_mix(concepts, rng.permutation([own, *beside]).tolist(), own, base.resolution, rng))
    return encoded(base, mixes)


def _mix(concepts: Sequence[Concept], numbers: Sequence[int], own: int, side: int, rng: np.random.Generator) -> Crop:
    """Return a picture of the concepts with `numbers`, from left to right."""
    edges = np.linspace(0, side, len(numbers) + 1).round().astype(int)
    strips = []
    for number, columns in zip(numbers, np.diff(edges).tolist(), strict=True):
        examples = concepts[number].examples
        strips.append(strip(examples[rng.integers(len(examples))], columns, side, rng))
    masks = [mask for _, mask in strips]
    captions = CAPTIONS[len(numbers)]
    return Crop(
        picture=Image.fromarray(np.concatenate([picture for picture, _ in strips], axis=1)),
        mask=Image.fromarray(np.concatenate(masks, axis=1)),
        place=Image.fromarray(
            np.concatenate([mask * np.uint8(number == own) for number, mask in zip(numbers, masks, strict=True)], axis=1)
        ),
        caption=captions[rng.integers(len(captions))].format(*(concepts[number].token for number in numbers)),
    )


def strip(example: Example, columns: int, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a photo around its mask as a part of a picture, `(rows, columns, 3)`, and the mask, `(rows, columns)`.

    The concept stands in the middle, and on the ground as far as it is not too tall for that.
    What lies beyond the photo's edges repeats them and counts as background.
    """
    photo, mask = example.photo.image, mask_of(example)
    box = box_of(mask)
    tallness = rows / columns
    least = max(box[2] - box[0], (box[3] - box[1]) / tallness)
    width = rng.uniform(CLOSEST, FARTHEST) * least
    height = tallness * width
    left = (box[0] + box[2] - width) / 2
    top = min(box[3] - GROUND * height, box[1])
    spans, rims = [], []
    for first, limit, length, pixels in ((left, photo.width, width, columns), (top, photo.height, height, rows)):
        inside = max(first, 0.0), min(first + length, float(limit))
        before = round((inside[0] - first) / length * pixels)
        shown = max(1, min(pixels - before, round((inside[1] - inside[0]) / length * pixels)))
        spans.append((*inside, shown))
        rims.append((before, pixels - before - shown))
    (left, right, across), (top, bottom, down) = spans
    picture, place = (
        np.asarray(image.resize((across, down), Image.Resampling.LANCZOS, box=(left, top, right, bottom)))
        for image in (photo.convert("RGB"), mask)
    )
    return np.pad(picture, (rims[1], rims[0], (0, 0)), mode="edge"), np.pad(place, (rims[1], rims[0]))
