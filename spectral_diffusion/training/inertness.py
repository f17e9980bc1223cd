"""Inertness: on prompts without its token, an adapted model must give what the bare base gives.

A delta trained on one concept alone answers to every prompt, and a sum of such deltas breaks each of them. So beside each
photo the trainer shows a picture that the base itself drew, with another caption, and asks for the base's own prediction.
Pictures, captions and predictions are made once, before the training, so that they cost one pass of the base only. Where a
concept is trained among others, there is a second such pool: what these give on prompts with their tokens must stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from spectral_diffusion.bases.base import Base
from spectral_diffusion.generation.latents import batches, draw_latents
from spectral_diffusion.prompts.conditioning import prompts, tokenize
from spectral_diffusion.stages import counted
from spectral_diffusion.training.batches import Pool
from spectral_diffusion.training.prediction import predict
from spectral_diffusion.training.trainable import class_word_vectors, moved

STRANGER = "<stranger-{}>"
STRANGERS = 48
"""Tokens with random vectors that stand for the tokens of other concepts, which do not exist yet."""
PICTURES = 32
DRAWING_STEPS = 12
GUIDANCE = 4.0
OTHER_CLASSES = (
    "dog", "cat", "man", "woman", "car", "bear", "horse", "robot", "toy", "vase", "bird", "ball", "mouse", "rabbit",
    "flower", "chair", "bag", "house",
)  # fmt: skip
PLACES = (
    "near a lake", "in the snow", "in the forest", "on the beach", "in the desert", "in the city", "in a room", "at night",
)  # fmt: skip


def stranger_vectors(
    base: Base, class_word: str, distance: float, seed: int, first: int = 0
) -> dict[str, dict[str, torch.Tensor]]:
    """Return, per stranger and text encoder, a `(1, width)` vector: a class word's, moved by `distance` norms of it.

    That is how the tokens of other concepts begin (see `first_vectors`), so a concept that leaves strangers alone leaves those
    alone which it never met, as far as their tokens stay where they began. Every other stranger is of the own class.

    Args:
        distance: where it is 0, tokens go about one norm by themselves, and so do the strangers.
        first: number of the first stranger, where several concepts have strangers of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    strangers = {}
    for number in range(STRANGERS):
        word = _pick(OTHER_CLASSES, generator) if number % 2 else class_word
        vectors = class_word_vectors(base, word).items()
        strangers[STRANGER.format(first + number)] = {part: moved(own, distance or 1.0, generator) for part, own in vectors}
    return strangers


def _pick(options: Sequence[str], generator: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def inert_captions(class_word: str, strangers: tuple[str, ...], count: int, generator: torch.Generator) -> list[str]:
    """Return captions without the concept's token: its class word, other classes, strangers, pairs, and nothing at all."""

    def pick(options: Sequence[str]) -> str:
        return _pick(options, generator)

    captions = []
    for number in range(count):
        kind = number % 8
        nouns = {
            0: f"a {class_word}", 1: f"a {class_word}", 2: f"a {pick(OTHER_CLASSES)}", 3: f"a {pick(OTHER_CLASSES)}",
            4: pick(strangers), 5: pick(strangers), 6: f"a {pick(OTHER_CLASSES)} and a {pick(OTHER_CLASSES)}",
        }  # fmt: skip
        captions.append(f"{nouns[kind]} {pick(PLACES)}" if kind in nouns else "")
    return captions


def build_inert_pool(base: Base, class_word: str, strangers: tuple[str, ...], count: int, seed: int) -> Pool:
    """Draw pictures with the base as it is and keep `count` noisy samples of them with its own predictions.

    Must be called while the strangers' tokens are known to the base, and nothing attached but what the samples are to hold.
    """
    generator = torch.Generator().manual_seed(seed)
    return build_pool(base, inert_captions(class_word, strangers, count, generator), generator)


@torch.no_grad()
def build_pool(base: Base, captions: Sequence[str], generator: torch.Generator) -> Pool:
    """Draw the first `PICTURES` of `captions` with what is attached, and keep a noisy sample of one of them for each caption."""
    count, to_draw = len(captions), list(captions[:PICTURES])
    drawn = torch.cat(
        [
            draw_latents(base, prompts(base, to_draw[share]), DRAWING_STEPS, GUIDANCE, generator=generator)
            for share in counted("reference pictures", "batch", batches(base, len(to_draw)))
        ]
    )
    noisy, times = noisy_samples(base, drawn, count, generator)
    shares = counted("reference predictions", "batch", batches(base, count))
    return predicted_pool(base, noisy, times, tokenize(base, captions), shares)


def predicted_pool(base: Base, noisy: torch.Tensor, times: torch.Tensor, ids: torch.Tensor, shares: Iterable[slice]) -> Pool:
    """Return noisy samples with what is predicted for them with what is attached, share by share."""
    return Pool(
        noisy=noisy,
        times=times,
        ids=ids,
        predictions=torch.cat([predict(base, noisy[share], times[share], ids[share]) for share in shares]),
    )


def noisy_samples(base: Base, drawn: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` samples of the latents `drawn`, each in its turn, at random times, and these."""
    scheduler, chosen = base.pipeline.scheduler, torch.arange(count) % len(drawn)
    noise = torch.randn((count, *drawn.shape[1:]), generator=generator).to(base.device)
    times = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=generator).to(base.device)
    return scheduler.add_noise(drawn[chosen.to(drawn.device)], noise, times), times
