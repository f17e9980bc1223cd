"""A change of one layer's weight as two thin factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
