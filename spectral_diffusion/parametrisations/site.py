"""Where a rival's change of one layer begins."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from spectral_diffusion.spectra.bands import Band


@dataclass(frozen=True, kw_only=True)
class Site:
    """One layer: its `key`, its frozen `weight (out, in)`, the concept's band or rank, and the concept's seed."""

    key: str
    weight: torch.Tensor
    band: Band
    seed: int

    def normal(self, rows: int, columns: int, *, shared: bool = False) -> torch.Tensor:
        """Return normal numbers `(rows, columns)` of this layer; with `shared`, the same for every seed."""
        seed = zlib.crc32(f"{self.key} {'' if shared else self.seed}".encode())
        numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        return numbers.to(self.weight.device)


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The trained `tensors` at their start, and `factors` that gives `up (out, k)` and `down (in, k)` from them."""

    tensors: dict[str, torch.Tensor]
    factors: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
