"""An ordinary LoRA, as other programs train it: two free thin matrices, no band, its alpha multiplied in (Hu et al. 2021)."""

from __future__ import annotations

import torch

TENSORS = ("up", "down")


def factors(band: None, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `up (out, r)` and `down (in, r)` as they are."""
    return tensors["up"], tensors["down"]
