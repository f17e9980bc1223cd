"""Latents that are drawn to be learnt from or looked at on the way, at the base's own size and with whatever is attached.

What users ask for is drawn by `generation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from spectral_diffusion.bases.base import Base


def batches(base: Base, count: int) -> list[slice]:
    """Return which of `count` samples go through `base` at once, so that memory suffices."""
    return [slice(start, start + base.pictures_at_once) for start in range(0, count, base.pictures_at_once)]


def draw_latents(base: Base, texts: Mapping[str, torch.Tensor], steps: int, guidance: float, **named: Any) -> torch.Tensor:
    """Return scaled latents `(n, channels, height, width)` in float32.

    Args:
        texts: what `conditioning.prompts` returns for `n` captions.
        steps: denoising steps.
        guidance: how strictly the captions are followed.
        named: more of what the pipeline takes.
    """
    side = base.resolution
    drawn = base.pipeline(
        **texts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=side,
        width=side,
        output_type="latent",
        **named,
    )
    return drawn.images.float()
