"""The band map: which singular directions of which layers each concept owns, how much it changes there, and cross-talk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from spectral_diffusion.adapters.adapter import Adapter, ConceptPart, input_group
from spectral_diffusion.joining import LowRank
from spectral_diffusion.spectra.spectrum import MAX_DIRECTIONS

_GROUPS = {
    "text_encoder": "Text encoder",
    "text_encoder_2": "Text encoder 2",
    "unet.down_blocks": "UNet, down",
    "unet.mid_block": "UNet, middle",
    "unet.up_blocks": "UNet, up",
}
_OTHER = "UNet, other"


@dataclass(frozen=True, kw_only=True)
class Share:
    """Directions `[start, stop)` that belong to `token` in a group of layers, and the Frobenius norm of its change there.

    An imported LoRA owns none and may change all: its `start` and `stop` are None.
    """

    token: str
    start: int | None
    stop: int | None
    energy: float


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """A group of layers: its name, the directions of its smallest layer, and who owns which."""

    group: str
    directions: int
    shares: tuple[Share, ...]


@dataclass(frozen=True, kw_only=True)
class BandMap:
    """The band map of several concepts.

    Attributes:
        rows: one per group of layers.
        conflicts: pairs of tokens whose bands overlap.
        cross_talk: `[i][j]` is how strongly concept j's change answers to the inputs of concept i, relative to concept i's
            own answer: `|delta_j G_i^(1/2)| / |delta_i G_i^(1/2)|` in Frobenius norm over all layers; 1 on the diagonal,
            None where concept i was not measured.
    """

    tokens: tuple[str, ...]
    rows: tuple[GroupRow, ...]
    conflicts: tuple[tuple[str, str], ...]
    cross_talk: tuple[tuple[float | None, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the map as plain dictionaries, lists, numbers and strings."""
        return asdict(self)


def band_map(adapters: Sequence[Adapter]) -> BandMap:
    """Return the band map of all concepts of `adapters`, their strengths included."""
    concepts = [concept for adapter in adapters for concept in adapter.concepts]
    strengths = [abs(weight) for adapter in adapters for weight in adapter.weights]
    deltas = [{key: concept.delta(key) for key in concept.layers} for concept in concepts]
    return BandMap(
        tokens=tuple(concept.token for concept in concepts),
        rows=_rows(concepts, strengths, deltas),
        conflicts=tuple(
            (one.token, other.token)
            for one, other in combinations(concepts, 2)
            if one.band and other.band and one.band.overlaps(other.band)
        ),
        cross_talk=tuple(_answers(concept, own, strengths, deltas) for own, concept in enumerate(concepts)),
    )


def layer_group(key: str) -> str:
    """Return the name of the group that layer `key` belongs to."""
    part, _, path = key.partition(".")
    return _GROUPS.get(f"{part}.{path.partition('.')[0]}") or _GROUPS.get(part, _OTHER)


def _rows(
    concepts: Sequence[ConceptPart], strengths: Sequence[float], deltas: Sequence[dict[str, LowRank]]
) -> tuple[GroupRow, ...]:
    keys = dict.fromkeys(key for concept in concepts for key in concept.layers)
    rows = []
    for group in sorted(set(map(layer_group, keys)), key=[*_GROUPS.values(), _OTHER].index):
        shares, directions = [], MAX_DIRECTIONS
        for concept, strength, changes in zip(concepts, strengths, deltas, strict=True):
            chosen = [key for key in concept.layers if layer_group(key) == group]
            if chosen:
                energy = strength * math.sqrt(sum(_norm(changes[key]) ** 2 for key in chosen))
                start, stop = (concept.band.start, concept.band.stop) if concept.band else (None, None)
                shares.append(Share(token=concept.token, start=start, stop=stop, energy=energy))
                directions = min([directions, *(min(concept.layers[key].shape) for key in chosen)])
        rows.append(GroupRow(group=group, directions=directions, shares=tuple(shares)))
    return tuple(rows)


def _answers(
    concept: ConceptPart, own: int, strengths: Sequence[float], deltas: Sequence[dict[str, LowRank]]
) -> tuple[float | None, ...]:
    """Return how strongly each concept's change answers to the inputs of `concept`, relative to its own answer."""
    squares = [0.0] * len(deltas)
    for key in concept.layers:
        factor = concept.activations.get(input_group(key))
        if factor is None:
            continue  # a convolution, of whose inputs nothing is measured, or a layer of an imported LoRA
        for index, changes in enumerate(deltas):
            if key in changes:
                answer = LowRank(up=changes[key].up, down=factor.to(changes[key].down.dtype).T @ changes[key].down)
                squares[index] += (strengths[index] * _norm(answer)) ** 2
    if not squares[own]:
        return (None,) * len(deltas)
    return tuple(math.sqrt(square / squares[own]) for square in squares)


def _norm(delta: LowRank) -> float:
    """Return the Frobenius norm of `up @ down.T` without forming it."""
    square = ((delta.up.T @ delta.up) * (delta.down.T @ delta.down)).sum()
    return math.sqrt(max(float(square), 0.0))
