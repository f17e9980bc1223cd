"""Gradient fusion (Mix-of-Show, Gu et al. 2023, section 3.3): a joined weight of a layer reproduces what each does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from spectral_diffusion.joining.inputs import Inputs
from spectral_diffusion.joining.low_rank import LowRank

ITERATIONS = 50


def gradient_fusion(deltas: Sequence[LowRank], weights: Sequence[float], inputs: Inputs) -> LowRank:
    """Return the delta that L-BFGS finds for `sum_i |(D - w_i delta_i) F_i|^2`, started from no change.

    Every gradient `2 sum_i (D - w_i delta_i) F_i F_i^T` has its columns in the span of the `up` factors. So with an
    orthonormal basis `Q` of that span and `D = Q X^T`, L-BFGS on the thin `X` takes the very steps that it takes on the dense
    `D` of the paper, and the low rank is kept. The inputs are those measured at the end of each training: no photos are needed.

    Args:
        inputs: what was measured of each concept's inputs.

    Raises:
        ArithmeticError: it diverged.
    """
    Q, R = torch.linalg.qr(torch.cat([delta.up for delta in deltas], dim=1).double())
    targets = []
    parts = R.split([delta.rank for delta in deltas], dim=1)
    for delta, weight, part, factor in zip(deltas, weights, parts, inputs.factors, strict=True):
        targets.append(weight * part @ (delta.down.double().T @ factor.double()))
    F, target = inputs.side_by_side, torch.cat(targets, dim=1)
    X = torch.zeros(len(F), Q.shape[1], dtype=F.dtype, device=F.device)
    if target.any():
        X = _least_squares(F, target, X)
    return LowRank(up=Q.to(deltas[0].up.dtype), down=X.to(deltas[0].down.dtype))


def _least_squares(F: torch.Tensor, target: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """Return the `X (in, k)` that L-BFGS finds for `|X^T F - target|^2`, relative to `|target|^2`."""
    size = target.square().sum()
    X.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [X], max_iter=ITERATIONS, history_size=25, line_search_fn="strong_wolfe", tolerance_grad=1e-16, tolerance_change=1e-16
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (X.T @ F - target).square().sum() / size
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
        final = loss().item()
    if not math.isfinite(final) or final > 1:  # 1 is what no change at all gives
        raise ArithmeticError("L-BFGS diverged")
    return X.detach()
