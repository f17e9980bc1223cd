"""Bands of singular directions, and the plan that gives every concept its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from spectral_diffusion.errors import BandError


@dataclass(frozen=True, kw_only=True, order=True)
class Band:
    """Singular directions `[start, start + rank)` of every adapted layer, 0 being the strongest."""

    start: int
    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BandError(f"The rank of a band must be at least 1, got {self.rank}.")
        if self.start < 0:
            raise BandError(f"A band must start at direction 0 or later, got {self.start}.")

    @property
    def stop(self) -> int:
        """First direction after the band."""
        return self.start + self.rank

    def overlaps(self, other: Band) -> bool:
        """Tell whether the two share a direction."""
        return self.start < other.stop and other.start < self.stop

    def __str__(self) -> str:
        return f"{self.start}-{self.stop - 1}"


def check_fits(band: Band, directions: int, layer: str) -> None:
    """Raise `BandError` when `band` reaches beyond the `directions` that `layer` (the smallest) has."""
    if band.rank > directions:
        raise BandError(f"Rank {band.rank} is larger than layer '{layer}' allows ({directions}); choose a smaller rank.")
    if band.stop > directions:
        raise BandError(
            f"Band {band} lies beyond layer '{layer}', which has {directions} directions; "
            f"start at {directions - band.rank} or earlier."
        )


def slots(directions: int, rank: int) -> int:
    """Return how many disjoint bands of `rank` a base with `directions` in its smallest layer has room for."""
    return directions // rank


def bands_in_order(rank: int, directions: int, *, weakest_first: bool = False) -> Iterator[Band]:
    """Yield every disjoint band of `rank` among `directions` in the order in which concepts get them, the strongest first."""
    numbers = range(slots(directions, rank))
    for number in reversed(numbers) if weakest_first else numbers:
        yield Band(start=number * rank, rank=rank)


def next_free_band(taken: Iterable[Band], rank: int, directions: int, *, weakest_first: bool = False) -> Band:
    """Return the first band of `rank` directions, in their order, that touches none of the bands `taken`.

    Raises:
        BandError: every slot is taken; the message says how many the base has.
    """
    taken = list(taken)
    for band in bands_in_order(rank, directions, weakest_first=weakest_first):
        if not any(band.overlaps(other) for other in taken):
            return band
    raise BandError(
        f"All {slots(directions, rank)} bands of rank {rank} that this base has room for are taken; "
        "choose a smaller rank, or avoid fewer adapters: those that it is never drawn with may share its band."
    )
