"""An ordinary LoRA: two free thin matrices, no band, its alpha multiplied in (Hu et al. 2021)."""

from __future__ import annotations

import torch

from spectral_diffusion.parametrisations.site import Beginning, Site

TENSORS = ("up", "down")


def begin(site: Site) -> Beginning:
    """Return `up (out, r)`, zero, and `down (in, r)`, normal with the variance of PEFT's and kohya's start; alpha is the rank."""
    out_features, in_features = site.weight.shape
    down = site.normal(in_features, site.band.rank) / (3 * in_features) ** 0.5
    up = torch.zeros(out_features, site.band.rank, device=down.device)
    return Beginning(tensors={"up": up, "down": down}, factors=lambda tensors: factors(None, tensors))


def factors(band: None, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `up (out, r)` and `down (in, r)` as they are."""
    return tensors["up"], tensors["down"]
