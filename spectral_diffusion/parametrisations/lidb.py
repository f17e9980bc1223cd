"""Light-weight DreamBooth: two small trained matrices between two fixed random ones (HyperDreamBooth, Ruiz et al. 2023).

`delta = U_aux P Q^T V_aux^T` with fixed orthonormal `U_aux (out, b)` and `V_aux (in, a)`, trained `P (b, r)` and `Q (a, r)`.
"""

from __future__ import annotations

import torch

from spectral_diffusion.parametrisations.site import Beginning, Site

DOWN_WIDTH, UP_WIDTH = 100, 50
"""The paper's `a` and `b`; a narrower layer takes its own width."""


def begin(site: Site) -> Beginning:
    """Return `P`, zero, and `Q`, normal over the root of its length."""
    out_features, in_features = site.weight.shape
    a, b = min(DOWN_WIDTH, in_features), min(UP_WIDTH, out_features)
    both = site.normal(in_features + out_features, max(a, b), shared=True)
    V_aux, U_aux = torch.linalg.qr(both[:in_features, :a]).Q, torch.linalg.qr(both[in_features:, :b]).Q
    P = torch.zeros(b, site.band.rank, device=V_aux.device)
    Q = site.normal(a, site.band.rank) / a**0.5
    return Beginning(tensors={"P": P, "Q": Q}, factors=lambda tensors: (U_aux @ tensors["P"], V_aux @ tensors["Q"]))
