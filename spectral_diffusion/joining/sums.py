"""The plain sum and the average: exact, without any measurement."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spectral_diffusion.joining.low_rank import LowRank


def weighted_sum(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return `sum_i w_i delta_i` exactly, by putting the factors side by side."""
    up = torch.cat([weight * delta.up for delta, weight in zip(deltas, weights, strict=True)], dim=1)
    return LowRank(up=up, down=torch.cat([delta.down for delta in deltas], dim=1))


def average(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return `(1 / n) sum_i w_i delta_i`, what averaging the `n` changed weights gives (FedAvg, McMahan et al. 2017)."""
    return weighted_sum(deltas, [weight / len(deltas) for weight in weights])
