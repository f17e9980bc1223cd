"""How well the bands of an adapter fit a base, which may be another of the family than the one it was trained on."""

from __future__ import annotations

import re
from collections import defaultdict

import torch

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import check_fits_base
from spectral_diffusion.bases.base import Base, adaptable_layers
from spectral_diffusion.bases.layer_matrix import matrix_of

GROUPS = ("text encoder", "UNet down", "UNet mid", "UNet up")
"""Groups of layers that a fit is told for, in the order of the data's way."""

ROUNDING = 0.01
"""A misfit below this comes from rounding, of the adapter's file or of a copy of its base in another precision."""


def layer_group(key: str) -> str:
    """Return which of `GROUPS` the layer `key` belongs to."""
    if not key.startswith("unet."):
        return "text encoder"
    match = re.match(r"unet\.(?:(mid|up)_block|conv_out)", key)
    return f"UNet {match[1] or 'up'}" if match else "UNet down"


@torch.no_grad()
def band_misfit(base: Base, adapter: Adapter) -> dict[str, float]:
    """Return per group of layers how far the base's weights `W` are from what the bands were taken from.

    It is `|U_b^T W V_b - diag(s_b)| / |diag(s_b)|` in Frobenius norm over all layers and concepts of the group: 0 on the base
    of the training, but for rounding; 1 where the band means nothing. Imported LoRAs have no bands and count for nothing.

    Raises:
        AdapterError: the adapter belongs to another family or its layers do not fit.
    """
    check_fits_base(base, adapter)
    layers = adaptable_layers(base, None)
    errors: dict[str, float] = defaultdict(float)
    sizes: dict[str, float] = defaultdict(float)
    for concept in adapter.concepts:
        for key, part in concept.layers.items():
            if part.band is None:
                continue
            weight = matrix_of(layers[key]).detach().float().cpu()
            met = part.band.U.T @ weight @ part.band.V
            errors[layer_group(key)] += float((met - torch.diag(part.band.s)).square().sum())
            sizes[layer_group(key)] += float(part.band.s.square().sum())
    return {group: (errors[group] / max(sizes[group], 1e-12)) ** 0.5 for group in GROUPS if group in sizes}


def misfit_in_words(misfit: dict[str, float]) -> str:
    """Return a misfit as `text encoder 3 %, UNet down 12 %`."""
    return ", ".join(f"{group} {100 * value:.3g} %" for group, value in misfit.items())
