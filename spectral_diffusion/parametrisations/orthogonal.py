"""Orthogonal adaptation: every concept's down projection is its own columns of one orthogonal basis (Po et al. 2023).

`delta = up down^T` with `down (in, r)` fixed; the concepts' inputs to their `up` are orthogonal, whatever is trained.
"""

from __future__ import annotations

import torch

from spectral_diffusion.parametrisations.site import Beginning, Site


def begin(site: Site) -> Beginning:
    """Return `up (out, r)`, zero; `down` is the band's columns of the layer's basis, which all concepts share."""
    out_features, in_features = site.weight.shape
    basis = torch.linalg.qr(site.normal(in_features, in_features, shared=True)).Q
    down = basis[:, site.band.start : site.band.stop].contiguous()
    up = torch.zeros(out_features, site.band.rank, device=down.device)
    return Beginning(tensors={"up": up}, factors=lambda tensors: (tensors["up"], down))
