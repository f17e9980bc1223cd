"""Subspace signal routing (SSR-Merge, Wei et al. 2026, arXiv 2606.10617): what a concept's inputs bring goes to its own `up`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spectral_diffusion.joining.inputs import Inputs
from spectral_diffusion.joining.low_rank import LowRank
from spectral_diffusion.joining.sums import weighted_sum

RIDGE = 1e-6
"""Added to the diagonal of the correlation matrix, relative to its mean: directions that nothing reaches have no inverse."""


def signal_routing(deltas: Sequence[LowRank], weights: Sequence[float], inputs: Inputs) -> LowRank:
    """Return `up M down^T` with all factors side by side and the small `M` that leads each concept's signals to its own `up`.

    It is the least-squares answer within the concepts' own directions: `M` minimises
    `sum_i |M down^T F_i - E_i w_i down_i^T F_i|^2`, where `E_i` puts the rows of concept `i` into place. So `M` is the paper's
    guide matrix times its inverse correlation matrix, from the Gram matrices that were measured at the end of each training
    instead of a pass of calibration.

    Args:
        inputs: what was measured of each concept's inputs.

    Raises:
        ArithmeticError: no concept's inputs reach any of the directions.
    """
    plain = weighted_sum(deltas, [1.0] * len(deltas))
    signals = [plain.down.double().T @ factor.double() for factor in inputs.factors]
    correlations = [own @ own.T for own in signals]
    guide, first = torch.zeros_like(correlations[0]), 0
    for delta, weight, own in zip(deltas, weights, correlations, strict=True):
        rows = slice(first, first + delta.rank)
        guide[rows] = weight * own[rows]
        first = rows.stop
    correlation = sum(correlations)
    correlation.diagonal().add_(RIDGE * correlation.diagonal().mean())
    cholesky, failed = torch.linalg.cholesky_ex(correlation)
    if failed.any():
        raise ArithmeticError("its normal equations are singular")
    routed = plain.down.double() @ torch.cholesky_solve(guide.T, cholesky)
    return LowRank(up=plain.up, down=routed.to(plain.down.dtype))
