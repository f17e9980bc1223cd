"""What one step shows: noisy crops of each concept's photos and, beside them, samples to stay inert on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from spectral_diffusion.base import Base
from spectral_diffusion.training.examples import EncodedExamples
from spectral_diffusion.training.inertness import InertPool
from spectral_diffusion.training.prediction import target
from spectral_diffusion.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a concept is trained on.

    Attributes:
        token, class_word: what it is called.
        words: what the token is written as for the text encoder, a word per vector.
        examples: its encoded photos.
        ids: token ids `(n, text encoders, length)` of their captions.
        tokens: `(n, length)`, 1 where the first of them is the concept's.
        pool: what to stay inert on.
        pool_among: what to stay inert on while others are attached; `pool` where these are trained at the same time.
    """

    token: str
    class_word: str
    words: str
    examples: EncodedExamples
    ids: torch.Tensor
    tokens: torch.Tensor
    pool: InertPool
    pool_among: InertPool


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`n` samples per concept, photos first, then those to stay inert on.

    Attributes:
        noisy, targets: `(concepts, n, channels, h, w)`.
        times: `(concepts, n)`.
        ids: `(concepts, n, text encoders, length)`.
        tokens: `(concepts, n, length)`, 1 where a word of a photo's caption is the concept's.
        places: `(concepts, n, 1, h, w)`, 1 where the concept is, everywhere without a mask.
        weights: `(concepts, n, 1, h, w)` of the squared distances, of mean 1 over the photos.
        shares: `(concepts, n, 2)`, how much each sample counts in the concept's loss and in the inertness loss.
        among: whether every sample passes through the sum of all concepts and those trained before.
    """

    noisy: torch.Tensor
    times: torch.Tensor
    ids: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    shares: torch.Tensor
    among: bool

    def part(self, number: int, parts: int) -> Batch:
        """Return part `number` of as many as `parts`, by samples."""
        whole = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "among"}
        return replace(self, **{name: tensor[:, number::parts] for name, tensor in whole.items()})


@torch.no_grad()
def draw_batch(base: Base, concepts: Sequence[Shown], settings: TrainingSettings, step: int, *, among: bool = False) -> Batch:
    """Return the batch of step number `step`; a concept's share is the same whatever others stand beside it.

    Args:
        among: whether this step is made among the others.
    """
    shares = [_share(base, concept, settings, step, among) for concept in concepts]
    return Batch(among=among, **{name: torch.stack([share[name] for share in shares]) for name in shares[0]})


def _share(base: Base, concept: Shown, settings: TrainingSettings, step: int, among: bool) -> dict[str, torch.Tensor]:
    examples, pool, scheduler = concept.examples, concept.pool_among if among else concept.pool, base.pipeline.scheduler
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    count, shape = settings.batch, examples.latents.shape[1:]
    chosen = torch.randint(examples.alone, (count,), generator=generator)
    noise = torch.randn((count, *shape), generator=generator)
    times = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=generator)
    inert = torch.randint(len(pool.noisy), (count if settings.inertness else 0,), generator=generator)
    beside = len(examples.latents) - examples.alone
    if among and beside:
        mixed = examples.alone + torch.randint(beside, (count,), generator=generator)
        chosen = torch.where(torch.rand(count, generator=generator) < settings.mixing, mixed, chosen)
    chosen, noise, times, inert = (_sent(tensor, base.device) for tensor in (chosen, noise, times, inert))
    clean, masks = examples.latents[chosen], examples.masks[chosen]
    weights = masks + (1 - masks) * settings.background
    weights = weights / weights.mean().clamp(min=1e-6)  # a crop beside the mask weighs nothing
    return {
        "noisy": torch.cat([scheduler.add_noise(clean, noise, times), pool.noisy[inert]]),
        "times": torch.cat([times, pool.times[inert]]),
        "ids": torch.cat([concept.ids[chosen], pool.ids[inert]]),
        "tokens": torch.cat([concept.tokens[chosen], concept.tokens.new_zeros(len(inert), concept.tokens.shape[1])]),
        "places": torch.cat([examples.places[chosen], masks.new_ones(len(inert), *masks.shape[1:])]),
        "targets": torch.cat([target(base, clean, noise, times), pool.predictions[inert]]),
        "weights": torch.cat([weights, weights.new_ones(len(inert), *weights.shape[1:])]),
        "shares": _sent(torch.block_diag(torch.ones(count, 1), torch.ones(len(inert), 1)) / count, base.device),
    }


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `tensor` on `device`, without waiting for a GPU to finish what it is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
