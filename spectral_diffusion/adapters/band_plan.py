"""The band plan: which bands the adapters of a library have taken, which one a new concept gets, and among whom it is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spectral_diffusion.adapters.adapter import Adapter, ConceptPart
from spectral_diffusion.adapters.adapter_file import is_adapter_file, load_adapter
from spectral_diffusion.bases.base import Base, adaptable_layers
from spectral_diffusion.errors import BandError, InputError
from spectral_diffusion.files import files_in
from spectral_diffusion.spectra.bands import Band, next_free_band
from spectral_diffusion.spectra.spectrum import directions_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TakenBand:
    """The band of the concept called `token` in the file `path`."""

    token: str
    band: Band
    path: Path


def known_adapters(places: Sequence[Path], base: Base, except_for: Sequence[Path]) -> dict[Path, Adapter]:
    """Return all adapters in `places` that belong to `base`'s family, by file.

    Args:
        places: adapter files, or folders of which every adapter counts.
        except_for: files that do not count, such as those that are about to be written.

    Raises:
        AdapterError: a file that was named is no adapter, or a folder does not exist.
    """
    known, excepted = {}, {path.resolve() for path in except_for}
    for path in _adapter_files(places):
        if path.resolve() in excepted:
            continue
        adapter = load_adapter(path)
        if adapter.family == base.family:
            known[path] = adapter
        else:
            logger.warning("'%s' belongs to bases of family '%s' and is not avoided.", path, adapter.family)
    return known


def taken_bands(known: dict[Path, Adapter]) -> list[TakenBand]:
    """Return the bands of the adapters in `known`, by file."""
    return [
        TakenBand(token=concept.token, band=concept.band, path=path)
        for path, adapter in known.items()
        for concept in adapter.concepts
        if concept.band
    ]


def neighbours(known: dict[Path, Adapter], tokens: Sequence[str]) -> Adapter | None:
    """Return the plain sum of the concepts in `known` to train new ones among, or nothing where there are none.

    Of a token that stands in several files the first concept counts, and none that is called as one of the new `tokens`: it
    can never be fused with it.
    """
    found: dict[str, ConceptPart] = {}
    for concept in (concept for adapter in known.values() for concept in adapter.concepts):
        if concept.token.lower() not in map(str.lower, tokens):
            found.setdefault(concept.token.lower(), concept)
    if not found:
        return None
    family = next(iter(known.values())).family
    return Adapter(family=family, fingerprint="", concepts=tuple(found.values()), weights=(1.0,) * len(found))


def fewest_directions(base: Base, endings: tuple[str, ...]) -> int:
    """Return how many singular directions the smallest of the layers that end in one of `endings` has.

    Raises:
        InputError: no layer ends so.
    """
    layers = adaptable_layers(base, endings)
    if not layers:
        raise InputError(f"No layer of '{base.source}' ends in {', '.join(endings)}; choose others as --layers.")
    return directions_of(layers)


def owner_of(band: Band, taken: Sequence[TakenBand]) -> TakenBand | None:
    """Return the first of `taken` that shares directions with `band`."""
    return next((other for other in taken if band.overlaps(other.band)), None)


def choose_band(
    start: int | None,
    rank: int,
    directions: int,
    taken: Sequence[TakenBand],
    *,
    weakest_first: bool = False,
    allow_overlap: bool = False,
) -> Band:
    """Return the band that begins at `start`, or the next free one when missing.

    Args:
        directions: singular directions of the base's smallest adapted layer.

    Raises:
        BandError: the band is taken, or none is left.
    """
    if start is None:
        return next_free_band([other.band for other in taken], rank, directions, weakest_first=weakest_first)
    band = Band(start=start, rank=rank)
    clash = owner_of(band, taken)
    if clash is not None and not allow_overlap:
        raise BandError(
            f"Directions {band} overlap with those of '{clash.token}' ({clash.band}, '{clash.path}'); "
            "leave --band out for the next free ones, or give --allow-overlap."
        )
    return band


def _adapter_files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            yield from filter(is_adapter_file, files_in(place, ".safetensors"))
        else:
            yield place


def band_again(part: ConceptPart, rank: int) -> Band:
    """Return the band on which `part` is trained longer; a form without one needs a rank only, and gets the first directions."""
    return part.band or Band(start=0, rank=rank)


def band_clash(part: ConceptPart, taken: Sequence[TakenBand]) -> str | None:
    """Return a sentence that says which of `taken` has directions of `part` too, so that training it longer is of no use to both.

    None where it has its band to itself, or needs none.
    """
    other = owner_of(part.band, taken) if part.band else None
    if other is None:
        return None
    return (
        f"'{part.token}' was trained on the directions {part.band} and '{other.token}' ('{other.path}') on {other.band}, "
        "so the two cannot be summed; train one of them anew on a band of its own."
    )
