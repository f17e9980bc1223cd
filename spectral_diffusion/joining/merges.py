"""Merges of model merging, on the dense deltas, cut to a low rank afterwards: the cut is part of the method, as in PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from spectral_diffusion.joining.low_rank import LowRank
from spectral_diffusion.joining.sums import weighted_sum

DENSITY = 0.5
"""Share of the entries that TIES and DARE keep."""
SEED = 0


def svd(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return the nearest delta to the plain sum whose rank is the largest of one concept (PEFT's `svd`)."""
    return weighted_sum(deltas, weights).compressed(max(delta.rank for delta in deltas))[0]


def ties(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Trim small entries, elect a sign for each, average those that agree (Yadav et al. 2023, arXiv 2306.01708)."""
    from peft.utils.merge_utils import ties

    return _cut(ties, deltas, weights)


def dare(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Drop entries at random, scale up the rest, add (Yu et al. 2023, arXiv 2311.03099); the same entries every time."""
    from peft.utils.merge_utils import dare_linear

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return _cut(dare_linear, deltas, weights)


def _cut(merge: Callable[..., torch.Tensor], deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return what `merge` makes of the dense deltas, cut to the rank of their sum."""
    dense = [delta.dense().float().cpu() for delta in deltas]
    merged = merge(dense, torch.tensor(weights), density=DENSITY)
    U, s, Vh = torch.linalg.svd(merged, full_matrices=False)
    rank = min(len(s), sum(delta.rank for delta in deltas))
    joined = LowRank(up=U[:, :rank] * s[:rank], down=Vh[:rank].T.contiguous())
    return LowRank(up=joined.up.to(deltas[0].up), down=joined.down.to(deltas[0].down))
