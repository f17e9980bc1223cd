"""How much of every position of a picture belongs to each of its regions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from spectral_diffusion.generation.regions import Region, extent


def coverage(regions: Sequence[Region], width: int, height: int) -> torch.Tensor:
    """Return `(regions, height, width)` shares in [0, 1]: how much of each position belongs to each region.

    Later regions lie on top of earlier ones; what the shares leave to 1 belongs to the context.
    """
    own = torch.stack([torch.from_numpy(extent(region, width, height)) for region in regions])
    above = torch.ones(height, width)
    for index in range(len(regions) - 1, -1, -1):
        own[index], above = own[index] * above, above * (1 - own[index])
    return own


def shares_at(shares: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return `shares (regions, height, width)` on a grid of `rows x columns` positions."""
    return F.interpolate(shares[None], size=(rows, columns), mode="area")[0]
