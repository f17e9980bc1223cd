"""What the base predicts for noisy latents, and what it should."""

from __future__ import annotations

import torch

from spectral_diffusion.bases.base import Base
from spectral_diffusion.prompts.conditioning import encode


def predict(base: Base, noisy: torch.Tensor, times: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return what the UNet predicts for `noisy (n, channels, h, w)` at `times (n)` with token `ids`, in float32."""
    unet = base.pipeline.unet
    return unet(noisy.to(unet.dtype), times, **encode(base, ids)).sample.float()


def target(base: Base, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Return what the base was trained to predict: the noise, or the velocity."""
    scheduler = base.pipeline.scheduler
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, times)
    return noise
