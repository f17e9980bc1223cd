"""A dense change, for what thin factors cannot hold: the result of DoRA, OFT or SVDiff. It is as large as the layer."""

from __future__ import annotations

import torch

TENSORS = ("matrix",)


def factors(band: None, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `up (out, k)` and `down (in, k)`, one of them the identity; `k` is the smaller side."""
    matrix = tensors["matrix"]
    identity = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return (matrix, identity) if matrix.shape[1] < matrix.shape[0] else (identity, matrix.T.contiguous())
