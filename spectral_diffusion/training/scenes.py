"""Pictures of a concept beside one or two others, as small as it is there: what a prompt of several asks for and no photo shows.
What was learnt large and by itself falls apart at half the size, and two that never met are blended when both are named.

A concept is cut out of a photo along its mask, with a little of what is around it, and stands in the middle of its place. Beside
it stand things of the base's own, or other concepts of the same go, as Cut-Mix has them in SVDiff (Han et al. 2023, arXiv
2303.11305, section 3.2). All that is not cut out is drawn by the base as it fills a hole (Blended Latent Diffusion, Avrahami et
al. 2023, arXiv 2206.02779). All concepts stand alike there, since from noise a base cannot tell where a thing is to stand, and
what stands anywhere is learnt as the mean of it all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import AutoPipelineForInpainting
from PIL import Image, ImageChops, ImageFilter

from spectral_diffusion.base import Base
from spectral_diffusion.concept import PLACEHOLDER, Concept, Example
from spectral_diffusion.conditioning import prompts
from spectral_diffusion.prompt_tokens import listed, name_by_class
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
class _Figure:
    """What stands in one place: its `name` in the caption, its class word, and the photo it is cut from, if any."""

    name: str
    class_word: str
    example: Example | None = None


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A scene with a hole: a crop of which only what is white in `cut` is right, and what the base is asked to draw."""

    crop: Crop
    cut: Image.Image
    request: str


def scene_examples(base: Base, concept: Concept, seed: int) -> EncodedExamples | None:
    """Return `PICTURES` pictures of `concept` beside things of the base's own; None where no photo has a mask."""
    if not any(example.mask is not None for example in concept.examples):
        logger.info("No photo of %s has a mask, so it is shown by itself only.", concept.token)
        return None
    rng = np.random.default_rng([seed, 3])

    def others(count: int) -> list[_Figure]:
        words = rng.choice([word for word in OTHER_CLASSES if word != concept.class_word], count, replace=False)
        return [_Figure(name=f"a {word}", class_word=str(word)) for word in words]

    examples = _scenes(base, concept, others, (2, 3), rng, seed)
    return replace(examples, scenes=len(examples.latents))


def meeting_examples(base: Base, concepts: Sequence[Concept], seed: int) -> list[EncodedExamples]:
    """Return for each of several concepts `PICTURES` pictures of it beside one or two of the others, in any order."""

    def of_one(number: int) -> EncodedExamples:
        rng = np.random.default_rng([seed, 2, number])
        rest = [concept for other, concept in enumerate(concepts) if other != number]

        def others(count: int) -> list[_Figure]:
            return [_figure(rest[index], rng) for index in rng.choice(len(rest), count, replace=False)]

        things = tuple(count for count in (2, 3) if count <= len(concepts))
        return _scenes(base, concepts[number], others, things, rng, seed)

    return [of_one(number) for number in range(len(concepts))]


@torch.no_grad()
def _scenes(
    base: Base,
    concept: Concept,
    others: Callable[[int], list[_Figure]],
    things: Sequence[int],
    rng: np.random.Generator,
    seed: int,
) -> EncodedExamples:
    """Return scenes of `concept` beside `others(count)`, so that as many figures stand in each as the numbers in `things` say."""
    begun = []
    for number in range(PICTURES):
        beside = others(things[number % len(things)] - 1)
        own = int(rng.integers(len(beside) + 1))
        figures = [*beside[:own], _figure(concept, rng), *beside[own:]]
        begun.append(_begin(figures, own, base.resolution, rng))
    examples = encoded(base, [one.crop for one in begun])
    return replace(examples, latents=_drawn(base, examples.latents, begun, seed))


def _figure(concept: Concept, rng: np.random.Generator) -> _Figure:
    """Return `concept` as one of its photos shows it, one with a mask where there is one."""
    cut_out = [example for example in concept.examples if example.mask is not None] or concept.examples
    return _Figure(name=concept.token, class_word=concept.class_word, example=cut_out[rng.integers(len(cut_out))])


def _begin(figures: Sequence[_Figure], own: int, side: int, rng: np.random.Generator) -> _Begun:
    """Return `figures`, from left to right, as far as they are known; the scene is that of the caption of number `own`."""
    slot = side / len(figures)
    shown = {
        number: _placed(figure.example, number, slot, side, rng)
        for number, figure in enumerate(figures)
        if figure.example is not None
    }
    picture, cut, place = shown[own][0].copy(), Image.new("L", (side, side)), Image.new("L", (side, side))
    known = np.full((side, side), 255, np.uint8)
    for number, (photo, its_place) in shown.items():
        its_cut = its_place  # around the others lies another scene
        if number == own:
            its_cut = its_place.filter(ImageFilter.MaxFilter(2 * round(MARGIN * side) + 1))
        picture.paste(photo, mask=its_place)
        cut, place = ImageChops.lighter(cut, its_cut), ImageChops.lighter(place, its_place)
        known = np.minimum(known, _known(its_cut, number * slot, (number + 1) * slot))
    caption = figures[own].example.caption.replace(PLACEHOLDER, listed([figure.name for figure in figures]))
    return _Begun(
        crop=Crop(
            picture=picture, mask=place, place=shown[own][1], caption=caption, known=Image.fromarray(np.maximum(known, cut))
        ),
        cut=cut,
        request=name_by_class(caption, {figure.name: figure.class_word for figure in figures if figure.example is not None}),
    )


def _placed(example: Example, number: int, slot: float, side: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Return the photo and its mask as they lie in a picture in whose place `number`, `slot` wide, the concept stands.

    What lies beyond the photo's edges repeats them.
    """
    photo, mask = example.photo.image.convert("RGB"), mask_of(example)
    left, top, right, bottom = box_of(mask)
    scale = rng.uniform(LEAST, MOST) * slot / max(right - left, bottom - top)
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    corner = round((number + 0.5) * slot - (left + right) / 2 * scale), round(GROUND * side - bottom * scale)
    columns, rows = (np.clip(np.arange(side) - start, 0, limit - 1) for start, limit in zip(corner, size, strict=True))
    small = np.asarray(photo.resize(size, Image.Resampling.LANCZOS))
    place = Image.new("L", (side, side))
    place.paste(mask.resize(size, Image.Resampling.LANCZOS), corner)
    return Image.fromarray(small[rows][:, columns]), place


def _known(cut: Image.Image, left: float, right: float) -> np.ndarray:
    """Return white where the picture is right: in `cut`, and beyond the columns of its place and of itself."""
    known = np.array(cut)
    across = np.flatnonzero((known > 127).any(0))
    known[:, : min([round(left), *across[:1]])] = 255
    known[:, max([round(right), *(across[-1:] + 1)]) :] = 255
    return known


def _drawn(base: Base, latents: torch.Tensor, begun: Sequence[_Begun], seed: int) -> torch.Tensor:
    """Return `latents` with everything drawn by the base but what was cut out."""
    pipeline = AutoPipelineForInpainting.from_pipe(base.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for start in range(0, len(begun), base.pictures_at_once):
        part = slice(start, start + base.pictures_at_once)
        images = pipeline(
            **prompts(base, [one.request for one in begun[part]]),
            image=latents[part],
            mask_image=[_hole(one.cut, latents.shape[-2:]) for one in begun[part]],
            masked_image_latents=torch.zeros_like(latents[part]),  # for bases made to fill holes, which none here is
            strength=1.0,
            num_inference_steps=DRAWING_STEPS,
            guidance_scale=base.guidance,
            height=base.resolution,
            width=base.resolution,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="latent",
        ).images
        drawn.append(images.float())
    return torch.cat(drawn)


def _hole(cut: Image.Image, size: torch.Size) -> Image.Image:
    """Return white where a latent shows less than a quarter of `cut`, in the picture's size."""
    small = cut.resize((size[1], size[0]), Image.Resampling.BOX).point(lambda value: 0 if value > 64 else 255)
    return small.resize(cut.size, Image.Resampling.NEAREST)
