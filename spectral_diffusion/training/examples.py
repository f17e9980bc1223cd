"""A concept's photos as the trainer sees them: crops encoded to latents once, with masks and captions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from spectral_diffusion.base import Base
from spectral_diffusion.concept import PLACEHOLDER, Concept

CROPS_PER_PHOTO = 8
"""Random crops of each photo that are encoded; half of them mirrored."""
LARGEST_ZOOM = 1.15
"""A photo's short side is brought to at most this many times the resolution before it is cropped."""


@dataclass(frozen=True, kw_only=True)
class EncodedExamples:
    """`latents (n, channels, h, w)` scaled, `masks (n, 1, h, w)` in [0, 1] (all ones without a mask), a caption each."""

    latents: torch.Tensor
    masks: torch.Tensor
    captions: tuple[str, ...]


@torch.no_grad()
def encode_examples(base: Base, concept: Concept, seed: int) -> EncodedExamples:
    """Crop and encode every photo of `concept` `CROPS_PER_PHOTO` times, at the base's resolution."""
    rng = np.random.default_rng(seed)
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
            captions.append(example.caption.replace(PLACEHOLDER, concept.token))
    return EncodedExamples(latents=torch.cat(latents), masks=torch.cat(masks), captions=tuple(captions))


def random_crop(picture: Image.Image, mask: Image.Image, side: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Return the same random square of `picture` and `mask`, `side` pixels wide, mirrored half of the time."""
    scale = side * rng.uniform(1.0, LARGEST_ZOOM) / min(picture.size)
    size = tuple(max(side, round(edge * scale)) for edge in picture.size)
    left, top = (int(rng.integers(edge - side + 1)) for edge in size)
    mirrored = rng.random() < 0.5
    results = []
    for image in (picture, mask):
        crop = image.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))
        results.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else crop)
    return results[0], results[1]
