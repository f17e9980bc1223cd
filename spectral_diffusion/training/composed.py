"""Pictures of several concepts that were trained apart, drawn by their own models, with what these predict for them.

No model knows all of them, and their sum loses what it is to learn; but each concept's own model draws it in a column of its own
(see `own_models`), and what all of them together predict for a noisy picture is what the sum should.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import beside
from spectral_diffusion.bases.base import Base
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.latents import batches, draw_latents
from spectral_diffusion.generation.own_models import own_models
from spectral_diffusion.generation.regions import suggest_regions
from spectral_diffusion.prompts.conditioning import prompts, tokenize
from spectral_diffusion.prompts.tokens import expand_prompt, listed, name_by_class
from spectral_diffusion.stages import counted
from spectral_diffusion.training.batches import Pool
from spectral_diffusion.training.inertness import DRAWING_STEPS, PLACES, noisy_samples, predicted_pool

GROUPS = 4
"""Groups that are chosen for each concept: it with one or two of the others."""
PICTURES = 3
"""Pictures of each group."""
SAMPLES = 8
"""Noisy samples of each picture."""
_SEVERAL = (2, 3)


@dataclass(frozen=True, kw_only=True)
class Several:
    """Samples of pictures in which a concept stands beside others.

    Attributes:
        together: with all of them named, and what their own models predict together, see `directed`.
        own: with the others named by their class words, and what its own model predicts.
    """

    together: Pool
    own: Pool


@torch.no_grad()
def composed_pools(base: Base, adapter: Adapter, written: Mapping[str, str], seed: int, strength: float) -> list[Several]:
    """Return for each concept of `adapter` samples of pictures in which it stands beside others.

    Args:
        adapter: the base must know its tokens, with nothing attached.
        written: the words that stand for each token.
        strength: see `directed`.
    """
    generator = torch.Generator().manual_seed(seed)
    together: dict[str, list[Pool]] = {token: [] for token in adapter.tokens}
    own: dict[str, list[Pool]] = {token: [] for token in adapter.tokens}
    for number, group in enumerate(counted("pictures of several", "group", _groups(len(adapter.concepts), generator))):
        tokens = [adapter.tokens[place] for place in group]
        prompt = f"{listed(tokens)} {PLACES[number % len(PLACES)]}"
        pool = _drawn(base, adapter.only(tokens), prompt, written, generator)
        all_of_them = directed(base, pool, strength)
        for token in tokens:
            together[token].append(all_of_them)
            own[token].append(_by_its_own_model(base, adapter.only([token]), prompt, adapter.class_words, written, pool))
    return [Several(together=_joined(together[token]), own=_joined(own[token])) for token in adapter.tokens]


@torch.no_grad()
def directed(base: Base, pool: Pool, strength: float) -> Pool:
    """Return `pool` with directions in which a distance counts `strength` times more: of what its predictions change.

    Args:
        base: with nothing attached.
    """
    changes = pool.predictions - _predicted(base, pool.noisy, pool.times, pool.ids).predictions
    sizes = changes.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-4)
    return replace(pool, directions=strength**0.5 * changes / sizes)


def _groups(concepts: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Return who stands in the pictures, from left to right: `GROUPS` times each concept, one or two others, in any order."""
    counts = [count for count in _SEVERAL if count <= concepts]
    groups = []
    for own in range(concepts):
        others = [number for number in range(concepts) if number != own]
        for number in range(GROUPS):
            beside_it = torch.randperm(len(others), generator=generator)[: counts[number % len(counts)] - 1].tolist()
            group = [own, *(others[place] for place in beside_it)]
            groups.append(tuple(group[place] for place in torch.randperm(len(group), generator=generator).tolist()))
    return groups


def _drawn(base: Base, adapter: Adapter, prompt: str, written: Mapping[str, str], generator: torch.Generator) -> Pool:
    """Draw `prompt`, which names all of `adapter`, and keep samples of the pictures with what the own models predict."""
    captions = [expand_prompt(prompt, written)] * PICTURES
    drawing = Drawing(prompt=prompt, regions=suggest_regions(prompt, adapter.class_words), guidance=base.guidance)
    with own_models(base, drawing, adapter):
        drawn = torch.cat(
            [
                draw_latents(base, prompts(base, captions[share]), DRAWING_STEPS, base.guidance, generator=generator)
                for share in batches(base, PICTURES)
            ]
        )
    noisy, times = noisy_samples(base, drawn, PICTURES * SAMPLES, generator)
    with own_models(base, replace(drawing, guidance=1.0), adapter):
        return _predicted(base, noisy, times, tokenize(base, captions[:1] * len(noisy)))


def _by_its_own_model(
    base: Base, adapter: Adapter, prompt: str, class_words: Mapping[str, str], written: Mapping[str, str], pool: Pool
) -> Pool:
    """Return the samples of `pool` with what the only concept of `adapter` predicts, which reads the others as class words."""
    caption = expand_prompt(name_by_class(prompt, {**class_words, adapter.tokens[0]: adapter.tokens[0]}), written)
    with beside(base, adapter):
        return _predicted(base, pool.noisy, pool.times, tokenize(base, [caption] * len(pool.noisy)))


def _predicted(base: Base, noisy: torch.Tensor, times: torch.Tensor, ids: torch.Tensor) -> Pool:
    """Return samples with what is predicted for them by the captions of `ids` with what is attached."""
    return predicted_pool(base, noisy, times, ids, batches(base, len(noisy)))


def _joined(pools: list[Pool]) -> Pool:
    return Pool(
        noisy=torch.cat([pool.noisy for pool in pools]),
        times=torch.cat([pool.times for pool in pools]),
        ids=torch.cat([pool.ids for pool in pools]),
        predictions=torch.cat([pool.predictions for pool in pools]),
        directions=None if pools[0].directions is None else torch.cat([pool.directions for pool in pools]),
    )
