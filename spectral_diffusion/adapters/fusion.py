"""Join several adapters into one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import combinations

from spectral_diffusion.adapters.adapter import Adapter, ConceptPart
from spectral_diffusion.errors import AdapterError, BandError

logger = logging.getLogger(__name__)


def trained_apart(concepts: Sequence[ConceptPart]) -> bool:
    """Tell whether one of `concepts` was not trained among all the others, as those trained in one go or settled are."""
    among = [{*concept.settings.get("among", ()), concept.token} for concept in concepts]
    return not all(others >= {concept.token for concept in concepts} for others in among)


def shown_together(concepts: Sequence[ConceptPart]) -> bool:
    """Tell whether `concepts` are several that learnt from pictures of each other: each leaves a part of these to the others."""
    mixed = all(concept.settings.get("mixing", 0.0) > 0 for concept in concepts)
    return len(concepts) > 1 and mixed and not trained_apart(concepts)


def default_method(concepts: Sequence[ConceptPart]) -> str:
    """Return the method that keeps more identity, see `benchmarks/README.md`.

    That is the plain sum for concepts that were each trained among all the others, because it is what they were trained in; and
    the aligned sum for those trained apart.
    """
    return "aligned" if trained_apart(concepts) else "sum"


def fuse(
    adapters: Sequence[Adapter],
    *,
    strengths: Sequence[float] | None = None,
    method: str | None = None,
    allow_overlap: bool = False,
) -> Adapter:
    """Join `adapters` into one that holds all their concepts.

    Args:
        strengths: factor on each adapter's own strengths; 1 when missing.
        method: how to join them, one of `adapter.METHODS` (see `joining.FUSERS`); the result is low-rank whatever the method.
            What `default_method` says when missing.
        allow_overlap: accept concepts that were trained on overlapping bands.

    Raises:
        AdapterError: nothing to fuse, one concept twice, two concepts with one token, different bases, or a concept without
            the measurements that the method needs, or a layer that it cannot join.
        BandError: two concepts share singular directions; the message names them.
    """
    if not adapters:
        raise AdapterError("There is nothing to fuse; give at least one adapter.")
    strengths = [1.0] * len(adapters) if strengths is None else list(strengths)
    if len(strengths) != len(adapters):
        raise AdapterError(f"{len(adapters)} adapters need as many strengths, got {len(strengths)}.")
    _check_one_base(adapters)
    weights = tuple(
        weight * strength for adapter, strength in zip(adapters, strengths, strict=True) for weight in adapter.weights
    )
    concepts = tuple(concept for adapter in adapters for concept in adapter.concepts)
    method = method or default_method(concepts)
    fused = Adapter(
        family=adapters[0].family,
        fingerprint=next((adapter.fingerprint for adapter in adapters if adapter.fingerprint), ""),
        concepts=concepts,
        weights=weights,
        method=method,
        prediction_type=next((adapter.prediction_type for adapter in adapters if adapter.prediction_type), ""),
    )
    if not allow_overlap:
        _check_bands(fused.concepts)
    if method != "sum":
        fused.deltas()  # a method that fails does so here, not when a picture is drawn
    return fused


def _check_one_base(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    known = next((adapter for adapter in adapters if adapter.fingerprint), first)
    predicting = next((adapter for adapter in adapters if adapter.prediction_type), first)
    for other in adapters:
        if other.family != first.family:
            raise AdapterError(
                f"'{first.tokens[0]}' was trained on a base of family '{first.family}', '{other.tokens[0]}' on one of family "
                f"'{other.family}'; fuse adapters of one family."
            )
        if "" != other.fingerprint != known.fingerprint:
            logger.warning(
                "'%s' and '%s' were trained on different bases; their bands may not be disjoint.",
                known.tokens[0],
                other.tokens[0],
            )
        if "" != other.prediction_type != predicting.prediction_type:
            logger.warning(
                "'%s' was trained on a base that predicts %s, '%s' on one that predicts %s; drawn together one of them is lost.",
                predicting.tokens[0],
                predicting.prediction_type,
                other.tokens[0],
                other.prediction_type,
            )


def _check_bands(concepts: Sequence[ConceptPart]) -> None:
    for one, other in combinations(concepts, 2):
        if one.band and other.band and one.band.overlaps(other.band):
            raise BandError(
                f"'{one.token}' (directions {one.band}) and '{other.token}' (directions {other.band}) share singular "
                "directions; train one again with --avoid and the other's file, or allow the overlap explicitly."
            )
