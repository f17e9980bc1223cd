"""How low-rank deltas of several concepts become one: pure mathematics, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

RHO = 1e-3
"""Weight of staying near the plain sum in the aligned sum, relative to Gram matrices of trace `in`."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A change of one layer's weight, `up (out, k) @ down (in, k).T`."""

    up: torch.Tensor
    down: torch.Tensor

    @property
    def rank(self) -> int:
        """Number of columns of the factors."""
        return self.up.shape[1]

    def dense(self) -> torch.Tensor:
        """Return the change as a matrix `(out, in)`."""
        return self.up @ self.down.T

    def balanced(self) -> LowRank:
        """Return the same change with each pair of columns equally long: in half precision neither over- nor underflows."""
        up_length, down_length = self.up.norm(dim=0), self.down.norm(dim=0)
        scale = torch.where((up_length > 0) & (down_length > 0), (down_length / up_length).sqrt(), torch.ones_like(up_length))
        return LowRank(up=self.up * scale, down=self.down / scale)

    def padded(self, rank: int) -> LowRank:
        """Return the same change with `rank` columns, those that are added being zero."""
        missing = (0, rank - self.rank)
        return LowRank(up=torch.nn.functional.pad(self.up, missing), down=torch.nn.functional.pad(self.down, missing))

    def compressed(self, rank: int) -> tuple[LowRank, torch.Tensor]:
        """Return the nearest change of at most `rank` columns, and all singular values, falling, of the whole one.

        The singular value decomposition is that of the small core between the factors' QR decompositions; the dense
        matrix is never formed.
        """
        Q_up, R_up = torch.linalg.qr(self.up.double())
        Q_down, R_down = torch.linalg.qr(self.down.double())
        U, s, Vh = torch.linalg.svd(R_up @ R_down.T, full_matrices=False)
        up, down = Q_up @ (U[:, :rank] * s[:rank]), Q_down @ Vh[:rank].T
        return LowRank(up=up.to(self.up.dtype), down=down.to(self.down.dtype)), s


def weighted_sum(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return `sum_i w_i delta_i` exactly, by putting the factors side by side."""
    up = torch.cat([weight * delta.up for delta, weight in zip(deltas, weights, strict=True)], dim=1)
    return LowRank(up=up, down=torch.cat([delta.down for delta in deltas], dim=1))


def aligned_sum(
    deltas: Sequence[LowRank], weights: Sequence[float], activations: Sequence[torch.Tensor], rho: float = RHO
) -> LowRank:
    """Return the delta that acts on each concept's inputs as that concept's own delta does.

    It minimises `sum_i |(D - w_i delta_i) G_i^(1/2)|^2 + rho |D - sum_i w_i delta_i|^2`, which gives
    `D = sum_i w_i up_i (Q^-1 (G_i + rho I) down_i)^T` with `Q = sum_i G_i + rho I`: the rank stays that of the sum.

    Args:
        deltas: one per concept.
        weights: one per concept.
        activations: per concept a factor `F (in, k)` of the Gram matrix `G = F F^T` of the layer's inputs while that
            concept's model draws its own prompts, scaled to trace `in`.
        rho: how strongly directions that no concept uses stay as in the plain sum.
    """
    identity = torch.eye(len(activations[0]), dtype=torch.float64, device=activations[0].device)
    factors = [factor.double() for factor in activations]
    Q = sum((factor @ factor.T for factor in factors), rho * identity)
    cholesky = torch.linalg.cholesky(Q)
    corrected = []
    for delta, factor in zip(deltas, factors, strict=True):
        down = delta.down.double()
        down = torch.cholesky_solve(factor @ (factor.T @ down) + rho * down, cholesky)
        corrected.append(LowRank(up=delta.up, down=down.to(delta.down.dtype)))
    return weighted_sum(corrected, weights)
