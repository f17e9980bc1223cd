"""Pictures as they form: the latents decoded on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from spectral_diffusion.bases.base import Base

PARTS = 4
"""A preview is shown after each of so many parts of the steps but the last, after which the picture is there."""

OnPreview = Callable[[int, Image.Image], None]
"""Called with a picture's seed and what it looks like so far."""


def watching(base: Base, steps: int, seeds: Sequence[int], on_preview: OnPreview) -> dict[str, Any]:
    """Return what the pipeline is called with so that `on_preview` sees the pictures of `seeds` form over `steps` steps."""
    moments = {steps * part // PARTS for part in range(1, PARTS)}

    def look(pipeline: Any, step: int, time: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step + 1 in moments:
            for seed, image in zip(seeds, decoded(base, values["latents"]), strict=True):
                on_preview(seed, image)
        return values

    return {"callback_on_step_end": look}


@torch.no_grad()
def decoded(base: Base, latents: torch.Tensor) -> list[Image.Image]:
    """Return the pictures that `latents (n, channels, h, w)`, noise included, stand for."""
    vae = base.pipeline.vae
    pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    return base.pipeline.image_processor.postprocess(pixels)
