"""Bands: which fit a layer, which overlap, and which one a new concept gets."""

from __future__ import annotations

import pytest

from spectral_diffusion.errors import BandError
from spectral_diffusion.spectra.bands import Band, check_fits, next_free_band, slots


@pytest.mark.parametrize(("start", "rank", "message"), [(0, 0, "at least 1, got 0"), (-1, 2, "at direction 0 or later, got -1")])
def test_an_impossible_band_is_refused(start: int, rank: int, message: str) -> None:
    with pytest.raises(BandError, match=message):
        Band(start=start, rank=rank)


@pytest.mark.parametrize(
    ("other", "shared"),
    [((0, 4), False), ((1, 4), True), ((5, 1), True), ((0, 20), True), ((7, 1), True), ((8, 2), False)],
)
def test_bands_overlap_when_they_share_a_direction(other: tuple[int, int], shared: bool) -> None:
    band, other = Band(start=4, rank=4), Band(start=other[0], rank=other[1])
    assert band.overlaps(other) == other.overlaps(band) == shared


def test_a_band_is_named_by_its_first_and_last_direction() -> None:
    assert str(Band(start=8, rank=8)) == "8-15"


def test_the_last_band_of_a_layer_fits_and_the_next_does_not() -> None:
    check_fits(Band(start=24, rank=8), 32, "unet.a")
    with pytest.raises(BandError, match=r"Band 25-32 lies beyond layer 'unet\.a', which has 32.* 24 or earlier"):
        check_fits(Band(start=25, rank=8), 32, "unet.a")
    with pytest.raises(BandError, match=r"Rank 33 is larger than layer 'unet\.a' allows \(32\)"):
        check_fits(Band(start=0, rank=33), 32, "unet.a")


def test_the_first_slot_that_touches_no_taken_band_is_chosen() -> None:
    taken = [Band(start=0, rank=8), Band(start=15, rank=2)]
    assert next_free_band(taken, rank=8, directions=48) == Band(start=24, rank=8)
    assert next_free_band(taken, rank=4, directions=48) == Band(start=8, rank=4)
    taken = [Band(start=46, rank=1)]
    assert next_free_band(taken, rank=8, directions=50, weakest_first=True) == Band(start=32, rank=8)
    assert next_free_band(taken, rank=4, directions=50, weakest_first=True) == Band(start=40, rank=4)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_base_has_room_for_as_many_disjoint_bands_as_it_has_slots(rank: int) -> None:
    taken: list[Band] = []
    for _ in range(slots(20, rank)):
        band = next_free_band(taken, rank, 20)
        check_fits(band, 20, "unet.a")
        assert not any(band.overlaps(other) for other in taken)
        taken.append(band)
    with pytest.raises(BandError, match=f"All {20 // rank} bands of rank {rank} .* are taken"):
        next_free_band(taken, rank, 20)
