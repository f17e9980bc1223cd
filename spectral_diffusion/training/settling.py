"""Settle concepts that were trained apart: teach their sum to give what each gave alone, without any photo.

Each concept's own model draws pictures of itself, and with the others' pictures of several, see `composed`; then all are
attached, and a short training asks their sum for the very predictions of those whose tokens the caption names, and for the
base's own on all other captions. That is what inertness asks of one concept, asked of all of them together (distillation,
Hinton et al. 2015, with every concept its own teacher).

What least squares cannot fit it leaves out: the sum would point the right way and be too weak, in some concepts much more than in
others. So among the others it counts more how far the sum falls short along what each concept changed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from spectral_diffusion.adapters.adapter import Adapter, ConceptPart
from spectral_diffusion.adapters.attach import beside
from spectral_diffusion.adapters.band_plan import band_again
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import AdapterError
from spectral_diffusion.parametrisations import SPECTRAL
from spectral_diffusion.training.activations import PROMPTS
from spectral_diffusion.training.batches import Pool, Source
from spectral_diffusion.training.composed import Several, composed_pools, directed
from spectral_diffusion.training.inertness import PICTURES, build_pool
from spectral_diffusion.training.loop import Subject, TrainingResult, train_subjects
from spectral_diffusion.training.run import TrainingProgress
from spectral_diffusion.training.settings import SETTLING_STEPS, TrainingSettings

SAMPLES = 512
"""Noisy samples of each concept's own pictures."""
PRESENCE = 0.75
"""Share of the steps in which the sum is asked; in the others each concept alone, which is to stay as it was."""
SEVERAL = 0.5
"""Share of the samples in which it stands beside others."""
STRENGTH = 4.0
"""How much more than others those distances count that lie along what the own models change of the base's predictions; so nearly
as much comes out as of each alone (see `benchmarks/findings.md`)."""


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What a concept's own model predicts, and beside others what their models predict together.

    Attributes:
        own: samples of its own pictures.
        own_among: the same for the sum, see `composed.directed`.
        several: samples of pictures in which it stands beside others.
    """

    own: Pool
    own_among: Pool
    several: Several

    def samples(
        self, base: Base, settings: TrainingSettings, count: int, generator: torch.Generator, *, among: bool
    ) -> dict[str, torch.Tensor]:
        """Return samples of its own pictures and, in a share of them, of pictures of several: as its own model sees these, or
        in a step among the others as all models do."""
        pools = (self.own_among, self.several.together) if among else (self.own, self.several.own)
        alone, beside_others = (pool.samples(base, settings, count, generator, among=among) for pool in pools)
        chosen = (torch.rand(count, generator=generator) < SEVERAL).to(base.device)
        return {
            name: torch.where(chosen.view(-1, *[1] * (tensor.dim() - 1)), beside_others[name], tensor)
            for name, tensor in alone.items()
        }

    def identity(self) -> tuple[torch.Tensor, ...]:
        """Return what tells both pools from others."""
        return self.own.identity() + self.several.together.identity() + self.several.own.identity()


def settle(
    base: Base,
    adapters: Sequence[Adapter],
    *,
    steps: int = SETTLING_STEPS,
    checkpoint: Path | None = None,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[TrainingResult]:
    """Return the concepts of `adapters`, trained `steps` more so that their plain sum acts as each of them did alone.

    Args:
        adapters: one concept each, trained on `base` in one parametrisation, spectral or LoRA, and rank; whether bands may
            overlap, `fuse` asks.
        checkpoint, on_progress, should_stop: see `train_together`.

    Raises:
        AdapterError: fewer than two, several concepts in one, or they were not trained alike or not on this base.
    """
    parts = _alike(adapters)
    settings = _settings(parts[0], steps)
    bands = [band_again(part, settings.rank) for part in parts]
    subjects = [Subject(token=part.token, class_word=part.class_word, band=band) for part, band in zip(parts, bands, strict=True)]

    def own_pictures(written: dict[str, str]) -> list[Source]:
        sources = []
        composed = composed_pools(base, fuse(adapters, method="sum", allow_overlap=True), written, settings.seed, STRENGTH)
        for adapter, part, several in zip(adapters, parts, composed, strict=True):
            captions = [PROMPTS[number % PICTURES % len(PROMPTS)].format(written[part.token]) for number in range(SAMPLES)]
            with beside(base, adapter):
                own = build_pool(base, captions, torch.Generator().manual_seed(settings.seed))
            sources.append(Taught(own=own, own_among=directed(base, own, STRENGTH), several=several))
        return sources

    return train_subjects(
        base,
        subjects,
        settings,
        own_pictures,
        among=None,
        start=adapters,
        checkpoint=checkpoint,
        on_progress=on_progress,
        should_stop=should_stop,
    )


def can_settle(adapters: Sequence[Adapter]) -> bool:
    """Tell whether `settle` takes `adapters`; whether they fit a base is not looked at."""
    try:
        _alike(adapters)
    except AdapterError:
        return False
    return True


def _alike(adapters: Sequence[Adapter]) -> list[ConceptPart]:
    """Return the concepts of `adapters` if they can be trained side by side."""
    if len(adapters) < 2:
        raise AdapterError("Settling needs at least two concepts; give two adapters or more.")
    several = next((adapter for adapter in adapters if len(adapter.concepts) > 1), None)
    if several is not None:
        raise AdapterError(f"The adapter of {', '.join(several.tokens)} is fused already; settle those that it was fused from.")
    parts = [adapter.concepts[0] for adapter in adapters]
    for part in parts:
        if part.settings.get("parametrisation") not in (*SPECTRAL, "lora"):
            raise AdapterError(f"'{part.token}' was not trained here as {', '.join(SPECTRAL)} or lora, so it cannot be settled.")
    for part in parts[1:]:
        for name, first, own in (
            ("parametrisation", parts[0].parametrisation, part.parametrisation),
            ("rank", parts[0].rank, part.rank),
            ("token_vectors", parts[0].token_vectors, part.token_vectors),
            ("layerwise_token", parts[0].is_layerwise, part.is_layerwise),
        ):
            if first != own:
                raise AdapterError(
                    f"'{part.token}' was trained with {name} {own}, '{parts[0].token}' with {first}; settle what is alike."
                )
    return parts


def _settings(part: ConceptPart, steps: int) -> TrainingSettings:
    """Return the settings that `part` was trained with, for a short training among the others."""
    known: dict[str, Any] = {
        field.name: part.settings[field.name] for field in fields(TrainingSettings) if field.name in part.settings
    }
    known["layers"] = tuple(known.get("layers", TrainingSettings().layers))
    return replace(TrainingSettings(**known), steps=steps, presence=PRESENCE, mixing=0.0, attention=0.0, sample_every=0)
