"""Pictures of a concept beside one or two other things, as small as it is there: what a prompt of several asks for and no photo
shows. What was learnt large and by itself falls apart at half the size.

The concept is cut out of a photo along its mask, with a little of what is around it, and stands in the middle of its place; the
other things, and the rest of the photo's scene, are drawn by the base as it fills a hole (Blended Latent Diffusion, Avrahami et
al. 2023, arXiv 2206.02779). All concepts stand alike there, since from noise a base cannot tell where a thing is to stand, and
what stands anywhere is learnt as the mean of it all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from spectral_diffusion.bases.base import Base
from spectral_diffusion.concepts.concept import PLACEHOLDER, Concept, Example
from spectral_diffusion.generation.latents import batches, draw_latents
from spectral_diffusion.prompts.conditioning import prompts
from spectral_diffusion.prompts.tokens import listed, name_by_class
from spectral_diffusion.stages import counted
from spectral_diffusion.training.examples import Crop, EncodedExamples, box_of, encoded, mask_of
from spectral_diffusion.training.inertness import OTHER_CLASSES

logger = logging.getLogger(__name__)

PICTURES = 48
"""Pictures of each concept that are made, half of them with two things and half with three."""
DRAWING_STEPS = 20
LEAST, MOST = 0.95, 1.0
"""The longer side of the concept, in parts of its place's width."""
GROUND = 0.88
"""Where its lower edge is, in parts of the picture."""
MARGIN = 0.05
"""How much around it is cut out with it, in parts of the picture."""


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A scene with a hole: a crop of which only what is white in `cut` is right, and what the base is asked to draw."""

    crop: Crop
    cut: Image.Image
    request: str


@torch.no_grad()
def scene_examples(base: Base, concept: Concept, seed: int) -> EncodedExamples | None:
    """Return `PICTURES` pictures of `concept` beside things of the base's own; None where no photo has a mask."""
    cut_out = [example for example in concept.examples if example.mask is not None]
    if not cut_out:
        logger.info("No photo of %s has a mask, so it is shown by itself only.", concept.token)
        return None
    rng = np.random.default_rng([seed, 3])
    begun = [
        _begin(cut_out[rng.integers(len(cut_out))], concept, 2 + number % 2, base.resolution, rng) for number in range(PICTURES)
    ]
    examples = encoded(base, [one.crop for one in begun])
    return replace(examples, latents=_drawn(base, examples.latents, begun, seed), scenes=len(begun))


def _begin(example: Example, concept: Concept, things: int, side: int, rng: np.random.Generator) -> _Begun:
    import cv2

    photo, mask = example.photo.image.convert("RGB"), mask_of(example)
    left, top, right, bottom = box_of(mask)
    slot, own = side / things, int(rng.integers(things))
    scale = rng.uniform(LEAST, MOST) * slot / max(right - left, bottom - top)
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    corner = round((own + 0.5) * slot - (left + right) / 2 * scale), round(GROUND * side - bottom * scale)
    picture, place = _placed(photo, mask, size, corner, side)
    reach = 2 * round(MARGIN * side) + 1
    cut = cv2.dilate(place, np.ones((reach, reach), np.uint8))
    known = cut.copy()
    across = np.flatnonzero((known > 127).any(0))
    known[:, : min([round(own * slot), *across[:1]])] = 255
    known[:, max([round((own + 1) * slot), *(across[-1:] + 1)]) :] = 255
    others = rng.choice([word for word in OTHER_CLASSES if word != concept.class_word], things - 1, replace=False)
    names = [f"a {other}" for other in others]
    caption = example.caption.replace(PLACEHOLDER, listed([*names[:own], concept.token, *names[own:]]))
    return _Begun(
        crop=Crop(
            picture=Image.fromarray(picture),
            mask=Image.fromarray(place),
            place=Image.fromarray(place),
            caption=caption,
            known=Image.fromarray(known),
        ),
        cut=Image.fromarray(cut),
        request=name_by_class(caption, {concept.token: concept.class_word}),
    )


def _placed(
    photo: Image.Image, mask: Image.Image, size: tuple[int, int], corner: tuple[int, int], side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what a square of `side` pixels shows of `photo` and `mask` at `size` with their upper left at `corner`.

    Beyond the photo its edges go on, and the mask is black. Only what shows is enlarged: around a tiny thing all would be huge.
    """
    shown = [(max(0, -start), min(limit, side - start)) for start, limit in zip(corner, size, strict=True)]
    rims = [(max(0, start), max(0, side - start - limit)) for start, limit in zip(corner, size, strict=True)]
    columns, rows = ([at * whole / limit for at in own] for own, whole, limit in zip(shown, photo.size, size, strict=True))
    pixels = shown[0][1] - shown[0][0], shown[1][1] - shown[1][0]
    picture, place = (
        np.asarray(image.resize(pixels, Image.Resampling.LANCZOS, box=(columns[0], rows[0], columns[1], rows[1])))
        for image in (photo, mask)
    )
    return np.pad(picture, (rims[1], rims[0], (0, 0)), mode="edge"), np.pad(place, (rims[1], rims[0]))


def _drawn(base: Base, latents: torch.Tensor, begun: Sequence[_Begun], seed: int) -> torch.Tensor:
    """Return `latents` with everything drawn by the base but what was cut out."""
    drawn = []
    for part in counted("scenes", "batch", batches(base, len(begun))):
        known = latents[part].to(base.device, base.pipeline.unet.dtype)
        noise = torch.randn(known.shape, generator=torch.Generator().manual_seed(seed + part.start)).to(known)
        hole = torch.stack([_hole(one.cut, known.shape[-2:]) for one in begun[part]]).to(known)
        texts = prompts(base, [one.request for one in begun[part]])
        blended = partial(_blended, known, noise, hole)
        drawn.append(draw_latents(base, texts, DRAWING_STEPS, base.guidance, latents=noise, callback_on_step_end=blended))
    return torch.cat(drawn)


def _blended(
    known: torch.Tensor, noise: torch.Tensor, hole: torch.Tensor, pipeline: Any, step: int, time: Any, values: dict[str, Any]
) -> dict[str, Any]:
    """Put what is `known` around the `hole` of the latents, as noisy as they are after this step.

    The inpainting pipelines do the same, but for latents of four channels only.
    """
    scheduler = pipeline.scheduler
    rest = scheduler.timesteps[step + 1 : step + 2]
    around = scheduler.add_noise(known, noise, rest) if len(rest) else known
    return {"latents": torch.lerp(around, values["latents"], hole)}


def _hole(cut: Image.Image, size: torch.Size) -> torch.Tensor:
    """Return `(1, h, w)`, `size` being `(h, w)`: 1 where a latent shows less than a quarter of `cut`, else 0."""
    small = cut.resize((size[1], size[0]), Image.Resampling.BOX)
    return torch.from_numpy((np.asarray(small) <= 64)[None])
