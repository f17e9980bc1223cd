"""How low-rank deltas of several concepts become one: pure mathematics, layer by layer, one function per method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spectral_diffusion.joining.aligned import RHO, aligned_sum, regression_mean
from spectral_diffusion.joining.gradient import gradient_fusion
from spectral_diffusion.joining.inputs import Inputs
from spectral_diffusion.joining.low_rank import LowRank
from spectral_diffusion.joining.merges import dare, svd, ties
from spectral_diffusion.joining.routing import signal_routing
from spectral_diffusion.joining.sums import average, weighted_sum

__all__ = ["FUSERS", "RHO", "Fuser", "Inputs", "LowRank", "aligned_sum", "weighted_sum"]


@dataclass(frozen=True, kw_only=True)
class Fuser:
    """A way to join concepts.

    Attributes:
        join: `(deltas, weights, inputs) -> LowRank`, one delta and weight per concept that counts in the layer.
        measured: whether it looks at the inputs.
        help: what it does, in a few words for the command line and the studio.
    """

    join: Callable[[Sequence[LowRank], Sequence[float], Inputs], LowRank]
    measured: bool
    help: str


def _unmeasured(join: Callable[[Sequence[LowRank], Sequence[float]], LowRank], help: str) -> Fuser:
    return Fuser(join=lambda deltas, weights, inputs: join(deltas, weights), measured=False, help=help)


FUSERS = {
    "sum": _unmeasured(weighted_sum, "the plain, exact sum"),
    "aligned": Fuser(join=aligned_sum, measured=True, help="the aligned sum, which keeps each concept as it acts alone"),
    "average": _unmeasured(average, "the sum divided by the number of concepts"),
    "gradient": Fuser(join=gradient_fusion, measured=True, help="gradient fusion as in Mix-of-Show, by L-BFGS"),
    "regmean": Fuser(join=regression_mean, measured=True, help="RegMean's regression"),
    "ssr": Fuser(join=signal_routing, measured=True, help="SSR-Merge: signals routed within the concepts' own directions"),
    "svd": _unmeasured(svd, "the sum cut to the largest rank of one concept"),
    "ties": _unmeasured(ties, "TIES: trimmed, signs elected; cut to the rank of the sum"),
    "dare": _unmeasured(dare, "DARE: half of the entries dropped at random; cut to the rank of the sum"),
}
"""Name to fuser of every way to join concepts. Concatenating LoRAs, as PEFT's `cat` does, is the plain sum."""
