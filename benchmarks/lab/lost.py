"""What a joined adapter loses of each concept, in the base's own measure: with less noise than any number of judged pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import attached, with_tokens
from spectral_diffusion.bases.base import Base
from spectral_diffusion.prompts.conditioning import tokenize
from spectral_diffusion.training.batches import Pool
from spectral_diffusion.training.inertness import build_pool
from spectral_diffusion.training.prediction import predict

SAMPLES = 96
_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Own:
    """Noisy samples of pictures that a concept's own model drew, with what it predicts there.

    Attributes:
        pool: samples and predictions.
        captions: of the samples, from the 33rd on not those that their pictures were drawn by but others of the concept; what
            the token's number is depends on who else is attached.
        effect: mean square of what the concept changes of the prediction of the bare base, which knows its token.
    """

    pool: Pool
    captions: tuple[str, ...]
    effect: float


def own_predictions(base: Base, adapter: Adapter, prompts: tuple[str, ...]) -> Own:
    """Return what the only concept of `adapter` predicts on its own pictures.

    Args:
        prompts: with `{}` for the token.
    """
    (part,) = adapter.concepts
    captions = tuple(prompts[number % len(prompts)].format(part.words) for number in range(SAMPLES))
    with attached(base, adapter):
        pool = build_pool(base, captions, torch.Generator().manual_seed(991))
    with with_tokens(base, adapter.embeddings):
        return Own(pool=pool, captions=captions, effect=_mean_square(base, pool, captions))


def lost(base: Base, fused: Adapter, own: Own) -> float:
    """Return the error of what `fused` predicts on a concept's own pictures, in parts of what the concept changes there.

    0 where the concept is as it is alone, 1 where as much is wrong as if it were missing; more where others disturb it."""
    with attached(base, fused):
        return _mean_square(base, own.pool, own.captions) / own.effect


@torch.no_grad()
def _mean_square(base: Base, pool: Pool, captions: Sequence[str]) -> float:
    """Return the mean square of what is predicted now without what was predicted then."""
    ids, errors = tokenize(base, captions), []
    for start in range(0, len(ids), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        errors.append(predict(base, pool.noisy[part], pool.times[part], ids[part]) - pool.predictions[part])
    return float(torch.cat(errors).square().mean())
