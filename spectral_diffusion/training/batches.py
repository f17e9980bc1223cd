"""What one step shows: of each concept noisy samples to learn from and, beside them, samples to stay inert on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch

from spectral_diffusion.bases.base import Base
from spectral_diffusion.training.company import draw_company
from spectral_diffusion.training.examples import EncodedExamples
from spectral_diffusion.training.prediction import target
from spectral_diffusion.training.settings import SEED_STRIDE, TrainingSettings


class Source(Protocol):
    """Where samples come from."""

    def samples(
        self, base: Base, settings: TrainingSettings, count: int, generator: torch.Generator, *, among: bool
    ) -> dict[str, torch.Tensor]:
        """Return `count` samples: every tensor of a `Batch` but `shares`, for one concept."""

    def identity(self) -> tuple[torch.Tensor, ...]:
        """Return what tells this source from others, whatever device it was made on."""


@dataclass(frozen=True, kw_only=True)
class Photos:
    """A concept's photos, to be denoised.

    Attributes:
        examples: the encoded photos.
        ids: token ids `(n, text encoders, length)` of their captions.
        tokens: `(n, length)`, 1 where the first of them is the concept's.
    """

    examples: EncodedExamples
    ids: torch.Tensor
    tokens: torch.Tensor

    def samples(
        self, base: Base, settings: TrainingSettings, count: int, generator: torch.Generator, *, among: bool
    ) -> dict[str, torch.Tensor]:
        """Return photos of random noisiness with what the base was trained to predict; other concepts are there if `among`."""
        examples, scheduler = self.examples, base.pipeline.scheduler
        chosen = torch.randint(examples.alone, (count,), generator=generator)
        noise = torch.randn((count, *examples.latents.shape[1:]), generator=generator)
        times = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=generator)
        apart = examples.alone + examples.scenes
        for share, first, end in (
            (settings.scenes, examples.alone, apart),
            (settings.mixing if among else 0.0, apart, len(examples.latents)),
        ):
            if share and first < end:
                others = torch.randint(first, end, (count,), generator=generator)
                chosen = torch.where(torch.rand(count, generator=generator) < share, others, chosen)
        chosen, noise, times = (_sent(tensor, base.device) for tensor in (chosen, noise, times))
        clean, masks = examples.latents[chosen], examples.masks[chosen]
        weights = (masks + (1 - masks) * settings.background) * examples.known[chosen]
        return {
            "noisy": scheduler.add_noise(clean, noise, times),
            "times": times,
            "ids": self.ids[chosen],
            "tokens": self.tokens[chosen],
            "places": examples.places[chosen],
            "targets": target(base, clean, noise, times),
            "weights": weights / weights.mean().clamp(min=1e-6),  # a crop beside the mask weighs nothing
            "directions": torch.zeros_like(clean),
        }

    def identity(self) -> tuple[torch.Tensor, ...]:
        """Return the fingerprints of the pictures, their masks and captions; latents differ a little from GPU to GPU."""
        return self.examples.prints, self.examples.masks, self.examples.known, self.ids


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Samples with what a model predicted for them, to be predicted again.

    Attributes:
        noisy: `(n, channels, h, w)`.
        times: `(n)`.
        ids: token ids `(n, text encoders, length)`.
        predictions: as `noisy`.
        directions: as `noisy`, see `Batch`; none: 0.
    """

    noisy: torch.Tensor
    times: torch.Tensor
    ids: torch.Tensor
    predictions: torch.Tensor
    directions: torch.Tensor | None = None

    def samples(
        self, base: Base, settings: TrainingSettings, count: int, generator: torch.Generator, *, among: bool
    ) -> dict[str, torch.Tensor]:
        """Return random samples, all positions counting alike and no word being special."""
        chosen = _sent(torch.randint(len(self.noisy), (count,), generator=generator), base.device)
        noisy, ids = self.noisy[chosen], self.ids[chosen]
        everywhere = torch.ones_like(noisy[:, :1])
        return {
            "noisy": noisy,
            "times": self.times[chosen],
            "ids": ids,
            "tokens": torch.zeros(ids[:, 0].shape, device=ids.device),
            "places": everywhere,
            "targets": self.predictions[chosen],
            "weights": everywhere,
            "directions": torch.zeros_like(noisy) if self.directions is None else self.directions[chosen],
        }

    def identity(self) -> tuple[torch.Tensor, ...]:
        """Return times and captions; predictions differ a little from run to run on a GPU."""
        return self.times, self.ids


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a concept is trained on.

    Attributes:
        token, class_word: what it is called.
        words: what the token is written as for the text encoder, a word per vector.
        ids: these words' numbers, `(n)`.
        learnt: what it is to give.
        pool: what to stay inert on.
        pool_among: what to stay inert on while others are attached; `pool` where these are trained at the same time.
    """

    token: str
    class_word: str
    words: str
    ids: torch.Tensor
    learnt: Source
    pool: Pool
    pool_among: Pool


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`n` samples per concept, those to learn from first, then those to stay inert on.

    Attributes:
        noisy, targets: `(concepts, n, channels, h, w)`.
        times: `(concepts, n)`.
        ids: `(concepts, n, text encoders, length)`.
        tokens: `(concepts, n, length)`, 1 where a word of a photo's caption is the concept's.
        places: `(concepts, n, 1, h, w)`, 1 where the concept is, everywhere without a mask.
        weights: `(concepts, n, 1, h, w)` of the squared distances, of mean 1 over the photos.
        directions: as `noisy`; the squared mean of a sample's distances times these counts too.
        shares: `(concepts, n, 2)`, how much each sample counts in the concept's loss and in the inertness loss.
        company: `(concepts, n, concepts)`, 1 where a concept is attached on a sample of a step among the others, as all are that
            its caption names.
        among: whether every sample passes through the sum of those concepts and of all trained before.
    """

    noisy: torch.Tensor
    times: torch.Tensor
    ids: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    directions: torch.Tensor
    shares: torch.Tensor
    company: torch.Tensor
    among: bool

    def part(self, number: int, parts: int) -> Batch:
        """Return part `number` of as many as `parts`, by samples."""
        whole = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "among"}
        return replace(self, **{name: tensor[:, number::parts] for name, tensor in whole.items()})


@torch.no_grad()
def draw_batch(base: Base, concepts: Sequence[Shown], settings: TrainingSettings, step: int, *, among: bool = False) -> Batch:
    """Return the batch of step number `step`; what a concept is shown is the same whatever others stand beside it.

    Args:
        among: whether this step is made among the others.
    """
    shares = [_share(base, concepts, number, settings, step, among) for number in range(len(concepts))]
    return Batch(among=among, **{name: torch.stack([share[name] for share in shares]) for name in shares[0]})


def _share(
    base: Base, concepts: Sequence[Shown], number: int, settings: TrainingSettings, step: int, among: bool
) -> dict[str, torch.Tensor]:
    concept, generator = concepts[number], torch.Generator().manual_seed(settings.seed * SEED_STRIDE + step)
    count, pool = settings.batch, concept.pool_among if among else concept.pool
    learnt = concept.learnt.samples(base, settings, count, generator, among=among)
    inert = pool.samples(base, settings, settings.inert_batch if settings.inertness else 0, generator, among=among)
    both = {name: torch.cat([own, inert[name]]) for name, own in learnt.items()}
    means = (torch.full((samples, 1), 1 / max(samples, 1)) for samples in (count, len(inert["times"])))
    shares = torch.block_diag(*means)
    company = _sent(draw_company(number, len(concepts), len(shares), generator), base.device)
    named = torch.stack([torch.isin(both["ids"][:, 0], other.ids).any(1) for other in concepts], dim=1)
    return both | {"shares": _sent(shares, base.device), "company": company.maximum(named.float())}


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `tensor` on `device`, without waiting for a GPU to finish what it is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
