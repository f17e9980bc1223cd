"""A concept's photos as the trainer sees them: crops encoded to latents once, with masks and captions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from spectral_diffusion.bases.base import Base
from spectral_diffusion.concepts.concept import PLACEHOLDER, Concept, Example
from spectral_diffusion.stages import counted
from spectral_diffusion.training.captions import vary_caption

CROPS_PER_PHOTO = 8
"""Random crops of each photo that are encoded."""
CLOSE_UP = 2.0
"""The closest crop is this many times as wide as what the mask shows: what is learnt larger leaves a scene no room."""
LARGEST_ZOOM = 1.15
"""Where that takes in all of the photo, the closest crop is the photo's short side over this."""
SHAKE = 0.06
"""How far the middle of a crop strays, in crops."""


@dataclass(frozen=True, kw_only=True)
class EncodedExamples:
    """What a concept is trained on: pictures of it alone, scenes of it beside the base's own things, and pictures of it beside
    other concepts, in this order.

    Attributes:
        latents: `(n, channels, h, w)`, scaled.
        masks: `(n, 1, h, w)` in [0, 1], where something is to be learnt: the concept and what stands beside it (all ones
            without a mask).
        places: `(n, 1, h, w)`, where the concept itself is.
        known: `(n, 1, h, w)`, 0 where the picture is not to be learnt from at all.
        captions: one each.
        prints: `(n, 32)`, the fingerprints of the pictures before they were encoded.
        alone: how many of them show it alone.
        scenes: how many of them are scenes.
    """

    latents: torch.Tensor
    masks: torch.Tensor
    places: torch.Tensor
    known: torch.Tensor
    captions: tuple[str, ...]
    prints: torch.Tensor
    alone: int = 0
    scenes: int = 0

    def followed_by(self, beside: EncodedExamples) -> EncodedExamples:
        """Return these pictures and, behind them, those of `beside`, none of which shows the concept alone."""
        return EncodedExamples(
            latents=torch.cat([self.latents, beside.latents]),
            masks=torch.cat([self.masks, beside.masks]),
            places=torch.cat([self.places, beside.places]),
            known=torch.cat([self.known, beside.known]),
            captions=self.captions + beside.captions,
            prints=torch.cat([self.prints, beside.prints]),
            alone=self.alone,
            scenes=self.scenes + beside.scenes,
        )


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A picture of the base's size before it is encoded, with where something is to be learnt and where the concept is.

    Attributes:
        known: white where the picture is right; None for everywhere.
    """

    picture: Image.Image
    mask: Image.Image
    place: Image.Image
    caption: str
    known: Image.Image | None = None


def encode_examples(base: Base, concept: Concept, seed: int, caption_dropout: float = 0.0) -> EncodedExamples:
    """Crop and encode every photo of `concept` `CROPS_PER_PHOTO` times, each with a variant of its caption."""
    rng, words = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    crops = []
    for example in concept.examples:
        mask = mask_of(example)
        for _ in range(CROPS_PER_PHOTO):
            picture, cropped_mask = random_crop(example.photo.image, mask, base.resolution, rng)
            caption = vary_caption(example.caption, caption_dropout, words).replace(PLACEHOLDER, concept.token)
            crops.append(Crop(picture=picture, mask=cropped_mask, place=cropped_mask, caption=caption))
    return replace(encoded(base, crops), alone=len(crops))


def mask_of(example: Example) -> Image.Image:
    """Return the photo's mask, white everywhere where it has none."""
    return example.mask or Image.new("L", example.photo.image.size, 255)


def box_of(mask: Image.Image) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of what is white in `mask`, in pixels; all of it where nothing is."""
    return mask.point(lambda value: 255 if value > 127 else 0).getbbox() or (0, 0, *mask.size)


@torch.no_grad()
def encoded(base: Base, crops: Sequence[Crop]) -> EncodedExamples:
    """Return `crops` as the trainer sees them, none of them counted as alone or as a scene."""
    vae = base.pipeline.vae
    latents = []
    for crop in counted("photos", "crop", crops):
        pixels = torch.from_numpy(np.array(crop.picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents.append(vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float() * vae.config.scaling_factor)
    size, device = latents[0].shape[-2:], latents[0].device
    return EncodedExamples(
        latents=torch.cat(latents),
        masks=torch.cat([_shrunk(crop.mask, size) for crop in crops]).to(device),
        places=torch.cat([_shrunk(crop.place, size) for crop in crops]).to(device),
        known=torch.cat([_shrunk(crop.known or Image.new("L", crop.picture.size, 255), size) for crop in crops]).to(device),
        captions=tuple(crop.caption for crop in crops),
        prints=torch.tensor([list(hashlib.sha256(crop.picture.tobytes()).digest()) for crop in crops], dtype=torch.uint8),
    )


def _shrunk(mask: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    small = mask.resize((size[1], size[0]), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small))[None, None].float() / 255


def random_crop(picture: Image.Image, mask: Image.Image, side: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Return the same random square of `picture` and `mask`, `side` pixels wide, around what is white in `mask`.

    It reaches from a close-up to the whole photo, with the concept near its middle as far as the photo's edges allow; where the
    concept is larger than the square, any part of it may lie there. Nothing is mirrored: what faces both ways at once is learnt
    as both halves in one, and few things look the same in a mirror.
    """
    box = box_of(mask)
    extent = box[2] - box[0], box[3] - box[1]
    whole = min(picture.size)
    edge = rng.uniform(min(CLOSE_UP * max(extent), whole / LARGEST_ZOOM), whole)
    corner = []
    for start, length, limit in zip(box, extent, picture.size, strict=False):
        play = max(length - edge, SHAKE * edge)
        middle = start + length / 2 + rng.uniform(-0.5, 0.5) * play
        corner.append(min(max(middle - edge / 2, 0.0), limit - edge))
    left, top = corner
    square = (left, top, left + edge, top + edge)
    crops = [image.resize((side, side), Image.Resampling.LANCZOS, box=square) for image in (picture, mask)]
    return crops[0], crops[1]
