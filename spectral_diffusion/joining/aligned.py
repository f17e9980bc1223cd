"""The aligned sum and its relatives: closed forms that use what was measured of each concept's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import isfinite, sqrt

import torch

from spectral_diffusion.joining.inputs import Inputs
from spectral_diffusion.joining.low_rank import LowRank
from spectral_diffusion.joining.sums import weighted_sum

RHO = 0.1
"""Weight of staying near the plain sum in the aligned sum, relative to Gram matrices of trace `in`. Of 0.01 to 30 it is near the
best, by what is lost of own predictions, with two to eight concepts, on attention only and on all linear layers (see
`benchmarks/findings.md`)."""
SHRINKAGE = 0.9
"""RegMean's factor on the entries of a Gram matrix beside its diagonal."""


def aligned_sum(deltas: Sequence[LowRank], weights: Sequence[float], inputs: Inputs, rho: float = RHO) -> LowRank:
    """Return the delta that acts on each concept's inputs as that concept's own delta does, and as strongly.

    That is the answer of `least_squares_sum`, made as strong as the concepts' own deltas are. Where all read alike, least
    squares gives the mean of what they do, and changes that point nowhere alike are shorter in the mean; layer upon layer that
    weakens every concept. So the joined delta is scaled until `sum_i |D F_i|^2 = sum_i |w_i delta_i F_i|^2`, at most by the root
    of the number of concepts, which is what as many orthogonal changes lose that read the very same.

    Args:
        deltas: one per concept.
        weights: one per concept.
        inputs: what was measured of each concept's inputs.
        rho: how strongly directions that no concept uses stay as in the plain sum.

    Raises:
        ArithmeticError: the measurements or the deltas are too large to compute with.
    """
    joined = least_squares_sum(deltas, weights, inputs, rho)
    pairs = zip(deltas, weights, inputs.factors, strict=True)
    own = sum(weight**2 * _energy(delta, factor) for delta, weight, factor in pairs)
    now = _energy(joined, inputs.side_by_side)
    if not isfinite(own + now):
        raise ArithmeticError("its changes are too large to compute with")
    scale = sqrt(own / max(now, own / len(deltas))) if own else 1.0
    return LowRank(up=joined.up, down=joined.down * scale)


def _energy(delta: LowRank, factor: torch.Tensor) -> float:
    """Return `|delta F|^2`, what `delta` gives on the inputs of Gram matrix `F F^T`."""
    read = delta.down.T @ factor.to(delta.down.dtype)
    return float((read * (delta.up.T @ delta.up @ read)).sum())


def least_squares_sum(deltas: Sequence[LowRank], weights: Sequence[float], inputs: Inputs, rho: float = RHO) -> LowRank:
    """Return the delta that acts on each concept's inputs most as that concept's own delta does.

    It minimises `sum_i |(D - w_i delta_i) G_i^(1/2)|^2 + rho |D - sum_i w_i delta_i|^2`, which gives
    `D = sum_i w_i up_i (Q^-1 (G_i + rho I) down_i)^T` with `Q = sum_i G_i + rho I`: the rank stays that of the sum. With all
    factors side by side in `F`, `Q^-1 F = F (rho I + F^T F)^-1`, so `down_i` loses `F (rho I + F^T F)^-1 F^T down_i`, where the
    rows of its own factor in `F^T down_i` are zero: what the others' inputs would read of it. Arguments and errors are those of
    `aligned_sum`.
    """
    F = inputs.side_by_side
    cholesky, failed = torch.linalg.cholesky_ex(inputs.inner + rho * torch.eye(F.shape[1], dtype=F.dtype, device=F.device))
    if failed.any():
        raise ArithmeticError("its normal equations are singular")
    plain = weighted_sum(deltas, weights)
    down = plain.down.double()
    read = F.T @ down
    for rows, columns in zip(_blocks(inputs.factors), _blocks([delta.down for delta in deltas]), strict=True):
        read[rows, columns] = 0
    aligned = down - F @ torch.cholesky_solve(read, cholesky)
    return LowRank(up=plain.up, down=aligned.to(plain.down.dtype))


def _blocks(matrices: Sequence[torch.Tensor]) -> list[slice]:
    """Return where the columns of each of `matrices` lie when all are put side by side."""
    ends = list(accumulate(matrix.shape[1] for matrix in matrices))
    return [slice(end - matrix.shape[1], end) for end, matrix in zip(ends, matrices, strict=True)]


def regression_mean(deltas: Sequence[LowRank], weights: Sequence[float], inputs: Inputs) -> LowRank:
    """Return RegMean's joined delta (Jin et al. 2023, arXiv 2212.09849, equation 2): low rank as the sum.

    It minimises `sum_i |(D - w_i delta_i) G_i^(1/2)|^2` with the entries of every `G_i` beside its diagonal shrunk by
    `SHRINKAGE`, which is what keeps the equations solvable.

    Raises:
        ArithmeticError: an input is zero for every concept, so the equations are singular.
    """
    grams = [_shrunk(factor.double()) for factor in inputs.factors]
    cholesky, failed = torch.linalg.cholesky_ex(sum(grams))
    if failed.any():
        raise ArithmeticError("its normal equations are singular")
    corrected = []
    for delta, gram in zip(deltas, grams, strict=True):
        down = torch.cholesky_solve(gram @ delta.down.double(), cholesky)
        corrected.append(LowRank(up=delta.up, down=down.to(delta.down.dtype)))
    return weighted_sum(corrected, weights)


def _shrunk(factor: torch.Tensor) -> torch.Tensor:
    gram = factor @ factor.T
    return SHRINKAGE * gram + (1 - SHRINKAGE) * torch.diag(gram.diagonal())
