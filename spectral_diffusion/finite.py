"""Tell quickly whether numbers are numbers."""

from __future__ import annotations

import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether `tensor` holds neither NaN nor infinite numbers, from its extremes: one pass, and no second tensor."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())
