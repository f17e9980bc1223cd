"""What several concepts' models feed into layers, and what the joining methods make of it once for all that read the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Inputs:
    """The measured inputs of one layer, or of several that read the same: queries, keys and values of one attention.

    Attributes:
        factors: per concept a factor `F (in, k)` of the Gram matrix `G = F F^T` of what its model reads there while it draws
            its own prompts, scaled to trace `in`; None where a method that does not look at it joins.
    """

    factors: Sequence[torch.Tensor | None]

    @cached_property
    def side_by_side(self) -> torch.Tensor:
        """All factors beside each other, `(in, k of all)`, in float64."""
        return torch.cat([factor.double() for factor in self.factors], dim=1)

    @cached_property
    def inner(self) -> torch.Tensor:
        """The inner products of all columns, `(k of all, k of all)`, in float64."""
        return self.side_by_side.T @ self.side_by_side
