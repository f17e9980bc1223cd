"""A concept's photos as the trainer sees them: crops encoded to latents once, with masks and captions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from spectral_diffusion.base import Base
from spectral_diffusion.concept import PLACEHOLDER, Concept
from spectral_diffusion.training.captions import vary_caption

CROPS_PER_PHOTO = 8
"""Random crops of each photo that are encoded."""
CLOSE_UP = 1.25
"""The closest crop is this many times as wide as what the mask shows."""
LARGEST_ZOOM = 1.15
"""Where that takes in all of the photo, the closest crop is the photo's short side over this."""
SHAKE = 0.06
"""How far the middle of a crop strays, in crops."""


@dataclass(frozen=True, kw_only=True)
class EncodedExamples:
    """`latents (n, channels, h, w)` scaled, `masks (n, 1, h, w)` in [0, 1] (all ones without a mask), a caption each."""

    latents: torch.Tensor
    masks: torch.Tensor
    captions: tuple[str, ...]


@torch.no_grad()
def encode_examples(base: Base, concept: Concept, seed: int, caption_dropout: float = 0.0) -> EncodedExamples:
    """Crop and encode every photo of `concept` `CROPS_PER_PHOTO` times, each with a variant of its caption."""
    rng, words = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    vae, side = base.pipeline.vae, base.resolution
    latents, masks, captions = [], [], []
    for example in concept.examples:
        mask = example.mask or Image.new("L", example.photo.image.size, 255)
        for _ in range(CROPS_PER_PHOTO):
            picture, cropped_mask = random_crop(example.photo.image, mask, side, rng)
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
            encoded = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor
            latents.append(encoded.float())
            small = cropped_mask.resize(encoded.shape[-2:][::-1], Image.Resampling.BOX)
            masks.append(torch.from_numpy(np.array(small))[None, None].float().to(encoded.device) / 255)
            caption = vary_caption(example.caption, caption_dropout, words)
            captions.append(caption.replace(PLACEHOLDER, concept.token))
    return EncodedExamples(latents=torch.cat(latents), masks=torch.cat(masks), captions=tuple(captions))


def random_crop(picture: Image.Image, mask: Image.Image, side: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Return the same random square of `picture` and `mask`, `side` pixels wide, around what is white in `mask`.

    It reaches from a close-up to the whole photo, with the concept near its middle as far as the photo's edges allow; where the
    concept is larger than the square, any part of it may lie there. Nothing is mirrored: what faces both ways at once is learnt
    as both halves in one, and few things look the same in a mirror.
    """
    box = mask.point(lambda value: 255 if value > 127 else 0).getbbox() or (0, 0, *picture.size)
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
