"""SVDiff: only the singular values are shifted, all of them (Han et al. 2023): `W' = U relu(diag(s + c)) V^T`."""

from __future__ import annotations

import torch

from spectral_diffusion.parametrisations.site import Beginning, Site
from spectral_diffusion.spectra.spectrum import singular_directions


def begin(site: Site) -> Beginning:
    """Return the shift `c` of all singular values, zero; the change has full rank."""
    spectrum = singular_directions(site.weight, min(site.weight.shape))

    def factors(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return spectrum.U * (torch.relu(spectrum.s + tensors["c"]) - spectrum.s), spectrum.V

    return Beginning(tensors={"c": torch.zeros_like(spectrum.s)}, factors=factors)
