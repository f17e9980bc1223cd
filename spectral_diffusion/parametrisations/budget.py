"""How many numbers each parametrisation trains, and the rank at which it comes nearest to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from spectral_diffusion.errors import InputError
from spectral_diffusion.parametrisations.lidb import DOWN_WIDTH, UP_WIDTH

ADALORA_START = 1.5
"""AdaLoRA begins with this many times the rank that it ends with on average (Zhang et al. 2023)."""

_COUNTS: dict[str, Callable[[int, int, int], int]] = {
    "additive": lambda out, into, r: r * (out + into + 1),
    "rotational": lambda out, into, r: r * (2 * r + 1),
    "lora": lambda out, into, r: r * (out + into),
    "orthogonal": lambda out, into, r: r * out,
    "lidb": lambda out, into, r: r * (min(DOWN_WIDTH, into) + min(UP_WIDTH, out)),
    "svdiff": lambda out, into, r: min(out, into),
    "dora": lambda out, into, r: r * (out + into) + out,
    "adalora": lambda out, into, r: adalora_start(r) * (out + into + 1),
    "oft": lambda out, into, r: into // r * (r * (r - 1) // 2),
    "vera": lambda out, into, r: r + out,
}


def adalora_start(rank: int) -> int:
    """Return the rank that AdaLoRA begins with to end with `rank` on average."""
    return math.ceil(ADALORA_START * rank)


def parameter_count(parametrisation: str, shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Return how many numbers are trained on layers of `shapes` `(out, in)`, token embeddings aside.

    `rank` is the block size for OFT, which must divide every `in`, and without effect for SVDiff.
    """
    return sum(_COUNTS[parametrisation](out, into, rank) for out, into in shapes)


def rank_for(parametrisation: str, shapes: Sequence[tuple[int, int]], budget: int) -> int:
    """Return the rank at which `parametrisation` comes nearest to `budget` trained numbers, in ratio.

    Raises:
        InputError: no block size divides every layer.
    """
    smallest = min(min(shape) for shape in shapes)
    ranks = range(1, smallest + 1)
    if parametrisation == "vera":
        ranks = range(1, max(max(shape) for shape in shapes) * 8 + 1)
    elif parametrisation == "oft":
        ranks = [size for size in range(2, smallest + 1) if all(into % size == 0 for _, into in shapes)]
        if not ranks:
            raise InputError("OFT needs a block size that divides the width of every layer; there is none.")
    return min(ranks, key=lambda rank: abs(math.log(parameter_count(parametrisation, shapes, rank) / budget)))
